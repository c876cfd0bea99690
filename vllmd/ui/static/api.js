// Everything that the page asks of the daemon goes through here: the documented admin API, and nothing else.
//
// A session has two halves: a cookie that scripts cannot read, and a token that the page keeps for this origin and
// sends in a header. The daemon wants both for every request, so neither another page nor another port of this
// machine can use a session.

const KEPT = "vllmd.session"; // in localStorage, which belongs to this origin alone, unlike a cookie

export class ApiError extends Error {
  constructor(status, message, retryAfter = null) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter; // seconds, or null
  }
}

const listeners = new Set();
let session = read();

function read() {
  try {
    return JSON.parse(localStorage.getItem(KEPT));
  } catch {
    return null; // storage is switched off, or what is there is not ours
  }
}

function keep(value) {
  session = value;
  try {
    if (value) localStorage.setItem(KEPT, JSON.stringify(value));
    else localStorage.removeItem(KEPT);
  } catch {
    // Without storage the session ends with the tab.
  }
  for (const listener of listeners) listener();
}

/** `{token, name, scopes, expires}` of whoever is signed in, or null. */
export const currentSession = () => session;
export const onSession = (listener) => (listeners.add(listener), () => listeners.delete(listener));
export const maySee = (scope) => Boolean(session && session.scopes.includes(scope));

/** Sign in by the code of a link, or by an API key. Throws ApiError. */
export async function signIn({ code = "", key = "" }) {
  const headers = { "content-type": "application/json" };
  if (key) headers.authorization = `Bearer ${key}`;
  const answer = await send("POST", "/ui/session", { headers, body: JSON.stringify(code ? { code } : {}) });
  keep(await answer.json());
}

/** End the session, here and in the daemon. */
export async function signOut() {
  try {
    await call("DELETE", "/ui/session");
  } catch {
    // It has ended already, or the daemon is away; it is forgotten here in any case.
  }
  keep(null);
}

/** The JSON answer of the admin API. Throws ApiError; a session that has ended is forgotten. */
export async function call(method, path, body = undefined, { signal } = {}) {
  const headers = body === undefined ? {} : { "content-type": "application/json" };
  const answer = await ask(method, path, { headers, body: body === undefined ? undefined : JSON.stringify(body), signal });
  return answer.status === 204 ? null : answer.json();
}

/** The text of an answer. */
export async function text(path, { signal } = {}) {
  return (await ask("GET", path, { signal })).text();
}

/** The lines of an answer as they come. */
export async function* lines(path, { signal, method = "GET", body, accept } = {}) {
  const headers = { ...(accept && { accept }), ...(body && { "content-type": "application/json" }) };
  const answer = await ask(method, path, { signal, headers, body: body && JSON.stringify(body) });
  yield* splitLines(answer.body);
}

/** The `data` of server-sent events, parsed, as they come; comments keep the connection alive and are dropped. */
export async function* events(path, { signal } = {}) {
  for await (const line of lines(path, { signal })) if (line.startsWith("data:")) yield JSON.parse(line.slice(5));
}

export async function* splitLines(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      const parts = (rest + value).split("\n");
      rest = parts.pop();
      for (const part of parts) yield part.replace(/\r$/, "");
    }
    if (rest) yield rest;
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function ask(method, path, init) {
  const headers = { ...init.headers };
  if (session) headers["x-vllmd-session"] = session.token;
  try {
    return await send(method, path, { ...init, headers });
  } catch (error) {
    if (error.status === 401 && session) keep(null);
    throw error;
  }
}

/** One request; throws ApiError where the daemon cannot be reached (status 0) or says no. */
export async function send(method, path, init) {
  let answer;
  try {
    answer = await fetch(path, { method, cache: "no-store", credentials: "same-origin", ...init });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "vllmd does not answer");
  }
  if (answer.ok) return answer;
  const wait = Number(answer.headers.get("retry-after"));
  throw new ApiError(answer.status, await messageOf(answer), Number.isFinite(wait) && wait > 0 ? wait : null);
}

async function messageOf(answer) {
  try {
    const { error } = await answer.json();
    return typeof error === "string" ? error : error.message;
  } catch {
    return `vllmd answered with status ${answer.status}`;
  }
}

export const modelPath = (name, verb) => `/admin/models/${encodeURIComponent(name)}/${verb}`;
