// The server's API: the model's name, and a reply as it is generated.

/** A failure to be shown: the server's own sentence where there is one. */
export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

export async function modelName(apiKey) {
  const response = await request("v1/models", { headers: headers(apiKey) });
  return (await response.json()).data[0].id;
}

/**
 * The reply to a conversation: yields {reasoning} and {text}, and at the end {usage} and {finishReason}.
 * @param {object} body of /v1/chat/completions
 * @param {AbortSignal} signal ends the reply; the server then stops generating
 */
export async function* streamReply(body, apiKey, signal) {
  const response = await request("v1/chat/completions", {
    method: "POST",
    headers: { ...headers(apiKey), "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  for await (const data of serverSentEvents(response.body)) {
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) throw new ApiError(event.error.message, 200);
    const choice = event.choices[0];
    if (choice?.delta.reasoning_content) yield { reasoning: choice.delta.reasoning_content };
    if (choice?.delta.content) yield { text: choice.delta.content };
    if (choice?.finish_reason) yield { finishReason: choice.finish_reason };
    if (event.usage) yield { usage: event.usage };
  }
}

async function* serverSentEvents(stream) {
  const decoder = new TextDecoder();
  const reader = stream.getReader();
  let buffer = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    buffer += decoder.decode(value, { stream: true });
    const events = buffer.split("\n\n");
    buffer = events.pop();
    for (const event of events) if (event.startsWith("data: ")) yield event.slice(6);
  }
}

function headers(apiKey) {
  return apiKey ? { Authorization: `Bearer ${apiKey}` } : {};
}

async function request(path, options) {
  let response;
  try {
    response = await fetch(path, { ...options, credentials: "omit" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server does not answer; it may have been stopped.", 0);
  }
  if (response.ok) return response;
  if (response.status === 401) throw new ApiError("The server asks for an API key; give it in the settings.", 401);
  const body = await response.json().catch(() => null);
  throw new ApiError(body?.error?.message ?? `The server answers with status ${response.status}.`, response.status);
}
