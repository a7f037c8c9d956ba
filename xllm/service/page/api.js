// The one place that talks to the server. The API key is held in this module and nowhere else.

let key = "";
const form = document.getElementById("key");
const field = document.getElementById("key-text");
const said = document.getElementById("key-said");

export class Refused extends Error {
  constructor(status, error) {
    super(error.message ?? `the server answered ${status}`);
    this.status = status;
    this.code = error.code;
    this.hint = error.hint;
  }
}

/** The response to GET, or to POST where there is a body. Throws Refused with what the server says. */
export async function call(path, body, signal) {
  const headers = body ? { "content-type": "application/json" } : {};
  if (key) headers.authorization = `Bearer ${key}`;
  const method = body ? "POST" : "GET";
  const answer = await fetch(path, { method, headers, signal, body: body && JSON.stringify(body), cache: "no-store" });
  if (answer.ok) return answer;
  const { error = {} } = await answer.json().catch(() => ({}));
  if (answer.status === 401) askForKey();
  throw new Refused(answer.status, error);
}

/** The JSON of each event of a stream. Throws what an event reports, and when the stream ends before its end. */
export async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the connection ended before the answer did");
    const lines = (held + value).split("\n");
    held = lines.pop();
    for (const line of lines) {
      if (line === "data: [DONE]") return;
      if (!line.startsWith("data: ")) continue;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Refused(answer.status, event.error);
      yield event;
    }
  }
}

function askForKey() {
  const asked = !form.hidden;
  form.hidden = false;
  if (!asked) field.focus();
  said.textContent = key ? "The server does not take this key." : "";
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  key = field.value.trim();
  try {
    await call("/v1/models");
  } catch (error) {
    said.textContent = error.message;
    return;
  }
  field.value = "";
  form.hidden = true;
  document.dispatchEvent(new Event("key"));
  document.getElementById("text").focus();
});
