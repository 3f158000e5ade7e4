// What the page asks of the server. Paths are relative, so that it works below any prefix of a proxy.

export class Refused extends Error {
  constructor(status, what, fix) {
    super(fix ? `${what}. ${fix}` : what);
    this.status = status;
    this.what = what;
  }
}

const TRIES_WHILE_BUSY = 4;

// as: how the answer is read, "json" or "blob".
async function ask(method, path, body, as = "json") {
  const options = { method, headers: {} };
  if (body !== undefined) {
    options.headers["content-type"] = "application/json";
    options.body = JSON.stringify(body);
  }
  for (let tries = 0; ; tries++) {
    let answer;
    try {
      answer = await fetch(`api/${path}`, options);
    } catch {
      throw new Refused(0, "The server does not answer", "Is it still running?");
    }
    if (answer.ok) return answer[as]();
    if (answer.status === 503 && tries < TRIES_WHILE_BUSY) {
      const seconds = Number(answer.headers.get("retry-after")) || 1;
      await new Promise((resolve) => setTimeout(resolve, seconds * 1000));
      continue;
    }
    const said = await answer.json().catch(() => ({}));
    throw new Refused(answer.status, said.error ?? `The server answers ${answer.status}`, said.fix);
  }
}

export const begin = (start) => ask("POST", "sessions", start);
export const show = (session) => ask("GET", `sessions/${session}`);
export const step = (session, body) => ask("POST", `sessions/${session}/step`, body);
export const undo = (session) => ask("POST", `sessions/${session}/undo`);
export const reset = (session, start) => ask("POST", `sessions/${session}/reset`, start);
export const film = (session, since) => ask("GET", `sessions/${session}/film.gif?since=${since}`, undefined, "blob");
export const actions = (session, side) => ask("GET", `sessions/${session}/actions.json?side=${side}`, undefined, "blob");
