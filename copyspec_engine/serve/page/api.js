/* Speaks to the server this page came from, in the form of OpenAI's chat completions. */

const value = (id) => document.getElementById(id).value.trim();

function headers(session) {
  const key = value("key");
  return {
    "Content-Type": "application/json",
    ...(key ? { Authorization: `Bearer ${key}` } : {}),
    ...(session ? { "X-Session-ID": session } : {}),
  };
}

/** The error of an answer that is none, in the server's own words. */
async function refused(response) {
  let message = `The server answered ${response.status}`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // It was no JSON: the status has to do.
  }
  return new Error(message);
}

/** The names of the models that are served. */
export async function models() {
  const response = await fetch("v1/models", { headers: headers() });
  if (!response.ok) throw await refused(response);
  return (await response.json()).data.map((model) => model.id);
}

/** Where the server's files and the chat's options are put together as the body of a call. */
function bodyOf(model, messages, prediction) {
  const system = value("system"), temperature = value("temperature"), most = value("max-tokens");
  return {
    model,
    messages: [...(system ? [{ role: "system", content: system }] : []), ...messages],
    stream: true,
    stream_options: { include_usage: true },
    copyspec: {
      segments: true, explain: true, stats: true,
      ...(document.getElementById("plain").checked ? { drafter: "none" } : {}),
    },
    ...(prediction ? { prediction: { type: "content", content: prediction } } : {}),
    ...(temperature ? { temperature: Number(temperature) } : {}),
    ...(most ? { max_completion_tokens: Number(most) } : {}),
  };
}

/**
 * The events of an answer as they come.
 *
 * @param {{model: string, session: string, messages: object[], prediction?: string, signal: AbortSignal}} call
 *   An aborted signal ends the stream, and the model stops writing.
 */
export async function* answer({ model, session, messages, prediction, signal }) {
  const response = await fetch("v1/chat/completions", {
    method: "POST", headers: headers(session), signal, body: JSON.stringify(bodyOf(model, messages, prediction)),
  });
  if (!response.ok) throw await refused(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { done, value: piece } = await reader.read();
    if (done) throw new Error("The answer broke off");
    waiting += piece;
    const lines = waiting.split("\n");
    waiting = lines.pop();
    for (const line of lines) {
      if (line === "data: [DONE]") return;
      if (!line.startsWith("data: ")) continue;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

/** Has the server forget a conversation, if it knows one of this name. */
export async function forget(session) {
  const path = `v1/copyspec/conversations/${encodeURIComponent(session)}`;
  const response = await fetch(path, { method: "DELETE", headers: headers() });
  if (!response.ok && response.status !== 404) throw await refused(response);
}
