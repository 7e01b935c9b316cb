// What the page asks of its server. The key stands behind the # of the address that `winnow studio` printed.

const KEPT = "winnow-studio-key";

function key() {
  const given = location.hash.slice(1);
  if (given) {
    sessionStorage.setItem(KEPT, given);
    history.replaceState(null, "", location.pathname);
  }
  return sessionStorage.getItem(KEPT);
}

const own = key();

/** The JSON of a route; an Error with a text for people where there is none. */
export async function call(path, body) {
  if (!own) throw new Error("Open the whole address that winnow studio printed: its key is missing here.");
  const headers = { authorization: `Bearer ${own}` };
  const given = body === undefined ? {} : { method: "POST", body: JSON.stringify(body) };
  if (body !== undefined) headers["content-type"] = "application/json";
  let answer;
  try {
    answer = await fetch(`/api/${path}`, { ...given, headers, cache: "no-store" });
  } catch {
    throw new Error("The studio does not answer. Is winnow studio still running?");
  }
  const found = await answer.json().catch(() => null);
  if (answer.status === 401) throw new Error("This key is of another run. Open the address that winnow studio printed.");
  if (!answer.ok) throw new Error(found?.error?.message ?? `The studio failed (${answer.status}).`);
  return found;
}

/** A function that runs one call at a time; of those that come meanwhile only the newest is made. */
export function newest(work) {
  let running = false;
  let waiting = null;
  return async (...given) => {
    waiting = given;
    if (running) return;
    running = true;
    while (waiting) {
      const now = waiting;
      waiting = null;
      await work(...now);
    }
    running = false;
  };
}
