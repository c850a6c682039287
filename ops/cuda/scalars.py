"""Short names of the scalar types that kernels cast to: numba takes a call of NumPy's types for a conversion."""

import numpy as np

u16, u32, u64, i32, f32 = np.uint16, np.uint32, np.uint64, np.int32, np.float32
