// The server's interface: requests, event streams, and what went wrong in plain words.

const KEY = "samba-lm.key";

/** Something that the reader is told. `status`: HTTP's, 0 where there was no answer. */
export class ServerError extends Error {
  constructor(message, { status = 0, retrySeconds = 0, code = null } = {}) {
    super(message);
    this.status = status;
    this.retrySeconds = retrySeconds;
    this.code = code;
  }
}

const GONE = "The server does not answer. It may have been stopped, or the connection is down.";
const CUT = "The connection to the server was lost before the answer was complete.";

/** Calls of the server that this page came from. */
export class Api {
  constructor() {
    try {
      this.key = sessionStorage.getItem(KEY) ?? "";
    } catch {
      this.key = "";
    }
  }

  setKey(key) {
    this.key = key.trim();
    try {
      if (this.key) sessionStorage.setItem(KEY, this.key);
      else sessionStorage.removeItem(KEY);
    } catch {
      // It holds until the page is left.
    }
  }

  /** The model that is served. */
  async model() {
    const list = await this.#json("GET", "v1/models");
    return list.data[0];
  }

  /** All contexts of this key. */
  async contexts() {
    return (await this.#json("GET", "v1/contexts")).data;
  }

  fork(id, title) {
    return this.#json("POST", `v1/contexts/${encodeURIComponent(id)}/fork`, { title });
  }

  remove(id) {
    return this.#json("DELETE", `v1/contexts/${encodeURIComponent(id)}`);
  }

  /** Make a context of a text (a Blob of UTF-8); yields how far the server is while it reads, the context last. */
  read(text, title, signal) {
    return this.#events(`v1/contexts?${new URLSearchParams({ title, stream: "true" })}`, text, signal);
  }

  /** An answer's chunks, as they come. */
  chat(body, signal) {
    const stream_options = { include_usage: true };
    return this.#events("v1/chat/completions", { ...body, stream: true, stream_options }, signal);
  }

  async #fetch(method, path, body, signal) {
    const headers = {};
    if (this.key) headers.Authorization = `Bearer ${this.key}`;
    const raw = body instanceof Blob;
    if (body !== undefined) headers["Content-Type"] = raw ? "application/octet-stream" : "application/json";
    let response;
    try {
      response = await fetch(path, {
        method,
        headers,
        signal,
        body: raw || body === undefined ? body : JSON.stringify(body),
      });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ServerError(GONE);
    }
    if (!response.ok) throw await refusal(response);
    return response;
  }

  async #json(method, path, body) {
    const response = await this.#fetch(method, path, body);
    try {
      return await response.json();
    } catch {
      throw new ServerError(CUT);
    }
  }

  async *#events(path, body, signal) {
    const response = await this.#fetch("POST", path, body, signal);
    for await (const data of eventData(response.body)) {
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new ServerError(event.error.message, { status: 500, code: event.error.code });
      yield event;
    }
    throw new ServerError(CUT);
  }
}

/** The `data:` of each event of a text/event-stream; comments are left out. */
export async function* eventData(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      let part;
      try {
        part = await reader.read();
      } catch (error) {
        if (error.name === "AbortError") throw error;
        throw new ServerError(CUT);
      }
      if (part.done) return;
      const events = (rest + part.value).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        const lines = event.split("\n").filter((line) => line.startsWith("data:"));
        if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // it has ended, or nobody reads on
  }
}

/** What an answer that is no success means. */
async function refusal(response) {
  const { status } = response;
  let told = null;
  try {
    told = (await response.json()).error;
  } catch {
    // Not the server itself but something before it.
  }
  const wait = Number.parseInt(response.headers.get("Retry-After") ?? "", 10);
  const retrySeconds = Number.isFinite(wait) ? Math.max(wait, 0) : 0;
  const when = retrySeconds ? ` Try again in ${retrySeconds} s.` : " Try again later.";
  const texts = {
    401: "The server does not take this API key. Write the right one into the settings.",
    403: "This API key may not do that.",
    413: "That is more than this server takes at once.",
    429: `The server has too much to do just now.${when}`,
    502: GONE,
    503: `The server is stopping or not ready.${when}`,
    504: GONE,
  };
  const codes = {
    context_not_found: "The document is no longer on the server: choose another one, or go on without it.",
    context_length_exceeded: "The conversation is too long to be read at once: begin a new one.",
  };
  let message = codes[told?.code] ?? texts[status] ?? told?.message ?? `The server refused with the status ${status}.`;
  if (status === 413 && told?.message) message += ` It says: ${told.message}`;
  return new ServerError(message, { status, retrySeconds, code: told?.code ?? null });
}
