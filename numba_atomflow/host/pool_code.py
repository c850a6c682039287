"""The thread pool of the CPU kernels, in LLVM's assembly language (`pool` compiles it and says what it is for).

A loop is cut into pieces. The calling thread and the workers take pieces from one counter, large ones first, until
none is left, and the call returns when all that were taken are done: a worker that does not run, because another
program has its core, takes none and delays no loop. A thread that waits (a worker for a loop, the caller for the last
piece) spins for `spin_ns` and then sleeps on a futex.

`open` is the state of a loop in one word, so that it is read and changed at once: the number of threads in the upper
half, the pieces not yet taken in the lower. A worker changes it only by taking pieces, and a loop with pieces
that are taken and not done cannot end: so `job` belongs to the pieces that a worker has taken, and a worker whose
number is not below the loop's threads takes none.

Source of sleeping without a lost wake-up (set a flag, then look again): U. Drepper, "Futexes Are Tricky" (2011).
"""

import platform

from numba_atomflow.host.numba_settings import MOST_THREADS

PIECES_PER_THREAD = 16
_FUTEX = {"x86_64": 202, "aarch64": 98}.get(platform.machine(), 0)
_PAUSE = {"x86_64": "@llvm.x86.sse2.pause()", "aarch64": "@llvm.aarch64.hint(i32 1)"}.get(platform.machine(), "")
_WAIT, _WAKE = 128, 129  # FUTEX_WAIT_PRIVATE, FUTEX_WAKE_PRIVATE
_SPINS = 32  # looks between two of the clock
_FAULTS = (4, 5, 7, 8, 11)  # signals of a thread's own faults; all others are blocked in workers
_MASK = ~sum(1 << (number - 1) for number in _FAULTS)
# The loop: function, arrays, counts, strides, data; number of counts less one, number of arrays, pieces.
_JOB = "{ ptr, ptr, ptr, ptr, ptr, i64, i64, i64 }"

CODE = f"""
%time = type {{ i64, i64 }}
@job = global {_JOB} zeroinitializer, align 64
@open = global i64 0, align 64
@done = global i64 0, align 64 ; pieces of this loop
@busy = global i64 0, align 64 ; a loop runs
@caller_sleeps = global i32 0, align 64
@asleep = global [{MOST_THREADS} x i32] zeroinitializer, align 64 ; by worker
@workers = global i64 1, align 64 ; threads that exist, the caller included
@spin_ns = global i64 0
@default_threads = global i64 1
@keys = global [2 x i32] zeroinitializer ; thread-local: a worker's number, a caller's number of threads

declare i64 @syscall(i64, ...)
declare i32 @pthread_create(ptr, ptr, ptr, ptr)
declare i32 @pthread_detach(i64)
declare i32 @pthread_sigmask(i32, ptr, ptr)
declare i32 @pthread_key_create(ptr, ptr)
declare i32 @pthread_setspecific(i32, ptr)
declare ptr @pthread_getspecific(i32)
declare i32 @clock_gettime(i32, ptr)
declare void {_PAUSE.replace("i32 1", "i32")}
declare void @llvm.memset.p0.i64(ptr, i8, i64, i1)
declare void @llvm.memcpy.p0.p0.i64(ptr, ptr, i64, i1)

define internal i64 @now() {{
  %time = alloca %time
  call i32 @clock_gettime(i32 1, ptr %time) ; CLOCK_MONOTONIC
  %ns_at = getelementptr %time, ptr %time, i64 0, i32 1
  %seconds = load i64, ptr %time
  %ns = load i64, ptr %ns_at
  %scaled = mul i64 %seconds, 1000000000
  %sum = add i64 %scaled, %ns
  ret i64 %sum
}}

define internal void @sleep(ptr %flag) {{ ; until the flag is not 1, or for no reason
  call i64 (i64, ...) @syscall(i64 {_FUTEX}, ptr %flag, i32 {_WAIT}, i32 1, ptr null)
  ret void
}}

define internal void @wake(ptr %flag) {{
  store atomic i32 0, ptr %flag seq_cst, align 4
  call i64 (i64, ...) @syscall(i64 {_FUTEX}, ptr %flag, i32 {_WAKE}, i32 1)
  ret void
}}

; --- a thread's numbers -----------------------------------------------------------------------------------------

define i64 @make_keys() {{ ; not 0: the process has no more
  %second = getelementptr [2 x i32], ptr @keys, i64 0, i64 1
  %failed = call i32 @pthread_key_create(ptr @keys, ptr null)
  %failed_too = call i32 @pthread_key_create(ptr %second, ptr null)
  %either = or i32 %failed, %failed_too
  %error = zext i32 %either to i64
  ret i64 %error
}}

define internal i64 @own(i64 %which) {{
  %key_at = getelementptr [2 x i32], ptr @keys, i64 0, i64 %which
  %key = load i32, ptr %key_at
  %value = call ptr @pthread_getspecific(i32 %key)
  %number = ptrtoint ptr %value to i64
  ret i64 %number
}}

define internal void @set_own(i64 %which, i64 %number) {{
  %key_at = getelementptr [2 x i32], ptr @keys, i64 0, i64 %which
  %key = load i32, ptr %key_at
  %value = inttoptr i64 %number to ptr
  call i32 @pthread_setspecific(i32 %key, ptr %value)
  ret void
}}

define i64 @get_thread_id() {{
  %number = call i64 @own(i64 0)
  ret i64 %number
}}

define i64 @get_num_threads() {{
  %number = call i64 @own(i64 1)
  %is_set = icmp ne i64 %number, 0
  %default = load i64, ptr @default_threads
  %threads = select i1 %is_set, i64 %number, i64 %default
  ret i64 %threads
}}

define void @set_num_threads(i64 %threads) {{
  call void @set_own(i64 1, i64 %threads)
  ret void
}}

define i64 @get_sched_size(i64 %threads, i64 %dimensions, ptr %starts, ptr %last) {{ ; pieces of a loop
entry:
  %start = load i64, ptr %starts
  %end = load i64, ptr %last
  %difference = sub i64 %end, %start
  %count = add i64 %difference, 1
  %is_row = icmp eq i64 %dimensions, 1
  %is_more = icmp sgt i64 %count, %threads
  %is_shared = icmp sgt i64 %threads, 1
  %both = and i1 %is_row, %is_more
  %cut = and i1 %both, %is_shared
  %most = mul i64 %threads, {PIECES_PER_THREAD}
  %fewer = icmp slt i64 %count, %most
  %pieces = select i1 %fewer, i64 %count, i64 %most
  %result = select i1 %cut, i64 %pieces, i64 %threads
  ret i64 %result
}}

; --- pieces -----------------------------------------------------------------------------------------------------

define internal void @run(i64 %first, i64 %count) {{ ; pieces first .. first + count - 1 of the job
entry:
  %job = load {_JOB}, ptr @job
  %function = extractvalue {_JOB} %job, 0
  %arrays = extractvalue {_JOB} %job, 1
  %counts = extractvalue {_JOB} %job, 2
  %strides = extractvalue {_JOB} %job, 3
  %data = extractvalue {_JOB} %job, 4
  %inner = extractvalue {_JOB} %job, 5
  %array_count = extractvalue {_JOB} %job, 6
  %lengths = add i64 %inner, 1
  %bytes = mul i64 %lengths, 8
  %own_counts = alloca i64, i64 %lengths
  %own_arrays = alloca ptr, i64 %array_count
  call void @llvm.memcpy.p0.p0.i64(ptr %own_counts, ptr %counts, i64 %bytes, i1 false)
  store i64 %count, ptr %own_counts
  br label %move

move:
  %i = phi i64 [ 0, %entry ], [ %next, %move ]
  %array_at = getelementptr ptr, ptr %arrays, i64 %i
  %stride_at = getelementptr i64, ptr %strides, i64 %i
  %own_at = getelementptr ptr, ptr %own_arrays, i64 %i
  %array = load ptr, ptr %array_at
  %stride = load i64, ptr %stride_at
  %offset = mul i64 %stride, %first
  %moved = getelementptr i8, ptr %array, i64 %offset
  store ptr %moved, ptr %own_at
  %next = add i64 %i, 1
  %more = icmp slt i64 %next, %array_count
  br i1 %more, label %move, label %call

call:
  call void %function(ptr %own_arrays, ptr %own_counts, ptr %strides, ptr %data)
  ret void
}}

define internal i64 @take(i64 %number) {{ ; run pieces until none is left: how many this thread ran
entry:
  br label %look

look:
  %ran = phi i64 [ 0, %entry ], [ %ran, %try ], [ %ran_more, %have ]
  %state = load atomic i64, ptr @open acquire, align 8
  %left = and i64 %state, 4294967295
  %threads = lshr i64 %state, 32
  %is_one = icmp ult i64 %number, %threads
  %is_left = icmp ne i64 %left, 0
  %may = and i1 %is_one, %is_left
  br i1 %may, label %try, label %out

try:
  %double = mul i64 %threads, 2
  %share = udiv i64 %left, %double
  %none = icmp eq i64 %share, 0
  %count = select i1 %none, i64 1, i64 %share
  %after = sub i64 %state, %count
  %exchange = cmpxchg ptr @open, i64 %state, i64 %after acq_rel acquire
  %took = extractvalue {{ i64, i1 }} %exchange, 1
  br i1 %took, label %have, label %look

have:
  %pieces_at = getelementptr {_JOB}, ptr @job, i64 0, i32 7
  %pieces = load i64, ptr %pieces_at
  %first = sub i64 %pieces, %left
  call void @run(i64 %first, i64 %count)
  %ran_more = add i64 %ran, %count
  br label %look

out:
  ret i64 %ran
}}

; --- workers ----------------------------------------------------------------------------------------------------

define internal i1 @may_take(i64 %number) {{
  %state = load atomic i64, ptr @open seq_cst, align 8
  %left = and i64 %state, 4294967295
  %threads = lshr i64 %state, 32
  %is_one = icmp ult i64 %number, %threads
  %is_left = icmp ne i64 %left, 0
  %may = and i1 %is_one, %is_left
  ret i1 %may
}}

define internal ptr @worker(ptr %argument) {{
entry:
  %number = ptrtoint ptr %argument to i64
  %flag = getelementptr [{MOST_THREADS} x i32], ptr @asleep, i64 0, i64 %number
  call void @set_own(i64 0, i64 %number)
  br label %wait

wait:
  %since = call i64 @now()
  br label %spin

spin:
  %spins = phi i64 [ 0, %wait ], [ 0, %clock ], [ %spins_more, %pause ]
  %may = call i1 @may_take(i64 %number)
  br i1 %may, label %work, label %pause

pause:
  call void {_PAUSE}
  %spins_more = add i64 %spins, 1
  %often = icmp eq i64 %spins_more, {_SPINS}
  br i1 %often, label %clock, label %spin

clock:
  %now = call i64 @now()
  %spun = sub i64 %now, %since
  %limit = load atomic i64, ptr @spin_ns monotonic, align 8
  %long = icmp sgt i64 %spun, %limit
  br i1 %long, label %tired, label %spin

tired:
  store atomic i32 1, ptr %flag seq_cst, align 4
  %may_now = call i1 @may_take(i64 %number)
  br i1 %may_now, label %rise, label %asleep

rise:
  store atomic i32 0, ptr %flag seq_cst, align 4
  br label %work

asleep:
  call void @sleep(ptr %flag)
  %still = load atomic i32, ptr %flag seq_cst, align 4
  %sleeps = icmp eq i32 %still, 1
  br i1 %sleeps, label %asleep, label %wait

work:
  %ran = call i64 @take(i64 %number)
  %nothing = icmp eq i64 %ran, 0
  br i1 %nothing, label %wait, label %report

report:
  %pieces_at = getelementptr {_JOB}, ptr @job, i64 0, i32 7
  %pieces = load i64, ptr %pieces_at
  %before = atomicrmw add ptr @done, i64 %ran seq_cst
  %done = add i64 %before, %ran
  %all = icmp eq i64 %done, %pieces
  br i1 %all, label %last, label %wait

last:
  %caller = load atomic i32, ptr @caller_sleeps seq_cst, align 4
  %waits = icmp eq i32 %caller, 1
  br i1 %waits, label %wake, label %wait

wake:
  call void @wake(ptr @caller_sleeps)
  br label %wait
}}

define void @forget_threads() {{ ; in a forked process, which has none
  store i64 1, ptr @workers
  store i64 0, ptr @open
  store i64 0, ptr @busy
  store i32 0, ptr @caller_sleeps
  call void @llvm.memset.p0.i64(ptr @asleep, i8 0, i64 {4 * MOST_THREADS}, i1 false)
  call void @set_own(i64 0, i64 0)
  ret void
}}

define internal void @start(i64 %threads) {{ ; the workers that are missing
entry:
  %mask = alloca [16 x i64]
  %previous = alloca [16 x i64]
  %thread = alloca i64
  store [16 x i64] [ {", ".join([f"i64 {_MASK}"] + ["i64 -1"] * 15)} ], ptr %mask
  call i32 @pthread_sigmask(i32 2, ptr %mask, ptr %previous) ; SIG_SETMASK
  br label %next

next:
  %number = load i64, ptr @workers
  %missing = icmp slt i64 %number, %threads
  br i1 %missing, label %create, label %out

create:
  %argument = inttoptr i64 %number to ptr
  %error = call i32 @pthread_create(ptr %thread, ptr null, ptr @worker, ptr %argument)
  %created = icmp eq i32 %error, 0
  br i1 %created, label %detach, label %out ; without it the others take its pieces

detach:
  %id = load i64, ptr %thread
  call i32 @pthread_detach(i64 %id)
  %more = add i64 %number, 1
  store i64 %more, ptr @workers
  br label %next

out:
  call i32 @pthread_sigmask(i32 2, ptr %previous, ptr null)
  ret void
}}

; --- the caller -------------------------------------------------------------------------------------------------

define void @parallel_for(ptr %function, ptr %arrays, ptr %counts, ptr %strides, ptr %data, i64 %inner,
                          i64 %array_count, i64 %threads) {{
entry:
  %pieces = load i64, ptr %counts
  %is_many = icmp sgt i64 %pieces, 1
  %is_shared = icmp sgt i64 %threads, 1
  %several = and i1 %is_many, %is_shared
  br i1 %several, label %claim, label %alone

claim:
  %exchange = cmpxchg ptr @busy, i64 0, i64 1 acq_rel acquire
  %claimed = extractvalue {{ i64, i1 }} %exchange, 1
  br i1 %claimed, label %check, label %alone

alone:
  call void %function(ptr %arrays, ptr %counts, ptr %strides, ptr %data)
  ret void

check:
  %workers = load i64, ptr @workers
  %missing = icmp slt i64 %workers, %threads
  br i1 %missing, label %create, label %begin

create:
  call void @start(i64 %threads)
  br label %begin

begin:
  %job_1 = insertvalue {_JOB} poison, ptr %function, 0
  %job_2 = insertvalue {_JOB} %job_1, ptr %arrays, 1
  %job_3 = insertvalue {_JOB} %job_2, ptr %counts, 2
  %job_4 = insertvalue {_JOB} %job_3, ptr %strides, 3
  %job_5 = insertvalue {_JOB} %job_4, ptr %data, 4
  %job_6 = insertvalue {_JOB} %job_5, i64 %inner, 5
  %job_7 = insertvalue {_JOB} %job_6, i64 %array_count, 6
  %job_8 = insertvalue {_JOB} %job_7, i64 %pieces, 7
  store {_JOB} %job_8, ptr @job
  store atomic i64 0, ptr @done release, align 8
  %upper = shl i64 %threads, 32
  %state = or i64 %upper, %pieces
  store atomic i64 %state, ptr @open seq_cst, align 8
  br label %call

call:
  %i = phi i64 [ 1, %begin ], [ %next, %called ]
  %flag = getelementptr [{MOST_THREADS} x i32], ptr @asleep, i64 0, i64 %i
  %sleeps = load atomic i32, ptr %flag seq_cst, align 4
  %is_asleep = icmp eq i32 %sleeps, 1
  br i1 %is_asleep, label %rouse, label %called

rouse:
  call void @wake(ptr %flag)
  br label %called

called:
  %next = add i64 %i, 1
  %more = icmp slt i64 %next, %threads
  br i1 %more, label %call, label %work

work:
  %ran = call i64 @take(i64 0)
  %before = atomicrmw add ptr @done, i64 %ran seq_cst
  %own_done = add i64 %before, %ran
  %all = icmp eq i64 %own_done, %pieces
  br i1 %all, label %out, label %wait

wait:
  %since = call i64 @now()
  br label %spin

spin:
  %spins = phi i64 [ 0, %wait ], [ 0, %clock ], [ %spins_more, %pause ]
  %done = load atomic i64, ptr @done seq_cst, align 8
  %is_done = icmp eq i64 %done, %pieces
  br i1 %is_done, label %out, label %pause

pause:
  call void {_PAUSE}
  %spins_more = add i64 %spins, 1
  %often = icmp eq i64 %spins_more, {_SPINS}
  br i1 %often, label %clock, label %spin

clock:
  %now = call i64 @now()
  %spun = sub i64 %now, %since
  %limit = load atomic i64, ptr @spin_ns monotonic, align 8
  %long = icmp sgt i64 %spun, %limit
  br i1 %long, label %tired, label %spin

tired:
  store atomic i32 1, ptr @caller_sleeps seq_cst, align 4
  %done_now = load atomic i64, ptr @done seq_cst, align 8
  %is_done_now = icmp eq i64 %done_now, %pieces
  br i1 %is_done_now, label %rise, label %asleep

asleep:
  call void @sleep(ptr @caller_sleeps)
  br label %tired

rise:
  store atomic i32 0, ptr @caller_sleeps seq_cst, align 4
  br label %out

out:
  store atomic i64 0, ptr @busy release, align 8
  ret void
}}
"""
