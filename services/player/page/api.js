// What the page asks of the server. Paths are relative, so that it works below any prefix of a proxy.

export class Refused extends Error {
  constructor(status, what, fix) {
    super(fix ? `${what}. ${fix}` : what);
    this.status = status;
    this.what = what;
  }
}

const TRIES_WHILE_BUSY = 4;

async function ask(method, path, body) {
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
    if (answer.ok) return answer.status === 204 ? null : answer.json();
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
export const filmPath = (session, since) => `api/sessions/${session}/film.gif?since=${since}`;
export const actionsPath = (session) => `api/sessions/${session}/actions.json`;
