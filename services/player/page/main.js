// The page's state, and what keys and buttons do to it.

import * as api from "./api.js";
import { codeButtons } from "./codes.js";
import { Screen, colourOf } from "./stage.js";

const $ = (id) => document.getElementById(id);
const ARROWS = { ArrowUp: "up", ArrowRight: "right", ArrowDown: "down", ArrowLeft: "left" };
const SIGNS = { up: "↑", right: "→", down: "↓", left: "←", still: "." };
const OTHERS = ["video", "prior", "still"];
const KEPT = "flam-session";
const RUN_MILLISECONDS = 1000 / 12;

const state = {
  scene: null, // the newest answer of the server
  models: [],
  clips: 1,
  slot: null, // of the first model, that is steered
  looked: null, // [slot of each side] under the pointer or the focus
  others: "video",
  running: false,
  runs: 0, // begun or ended so far
  recordedFrom: null,
  held: null, // the action whose key is down
};
let screens = [new Screen(document.querySelector(".side"))];
let asking = false; // one request at a time; what is asked meanwhile waits in `next`, and only the last of it
let next = null;

// --- talking to the server ---------------------------------------------------------------------------------------

async function ask(work) {
  if (asking) {
    next = work;
    return;
  }
  asking = true;
  document.body.ariaBusy = "true";
  if ($("status").classList.contains("alert")) say(""); // what went wrong before is over, or is said again
  try {
    for (let current = work; current; current = next) {
      next = null;
      await current();
    }
  } catch (error) {
    if (!(error instanceof api.Refused)) throw error;
    next = null;
    setRunning(false);
    if (error.status === 404) sceneGone(error.what);
    else say(error.message, true);
    $("retry").hidden = state.scene !== null;
  } finally {
    asking = false;
    document.body.ariaBusy = "false";
  }
}

const opened = async (answer) => {
  state.models = answer.models;
  state.clips = answer.clips;
  sessionStorage.setItem(KEPT, answer.session);
  if (state.slot !== null && state.slot >= answer.models[0].slots.length) state.slot = null;
  if (state.recordedFrom !== null) setRecording(false);
  setSides(answer.models.length);
  nameModels();
  listSlots();
  $("clip").max = answer.clips;
  $("clip").value = answer.clip + 1;
  $("seed").value = answer.seed;
  await show(answer);
};

const begin = (start) => ask(async () => {
  await opened(await api.begin(start));
  say("");
});

async function resume() {
  const kept = sessionStorage.getItem(KEPT);
  await ask(async () => {
    let answer = null;
    if (kept) {
      try {
        answer = await api.show(kept);
      } catch (error) {
        if (error.status !== 404) throw error;
      }
    }
    await opened(answer ?? (await api.begin({})));
    say("");
  });
}

const reset = (clip, seed) => !state.scene ? begin({ clip, seed }) : ask(async () => {
  await opened(await api.reset(state.scene.session, { clip, seed }));
  say(`Scene ${clip + 1} from its start.`);
});

const undo = () => state.scene && ask(async () => {
  if (!state.scene.undo_left) return say("There is no step to take back.");
  await show(await api.undo(state.scene.session));
});

// action: { code }, { arrow }, or {} to stand still.
const act = async (action) => state.scene && ask(async () => {
  const body = { others: state.others };
  if (state.slot !== null) Object.assign(body, { slot: state.slot }, action);
  else if (action.code !== undefined || action.arrow !== undefined) return say("Take a slot first: click it, or Tab to it.");
  const begun = performance.now();
  state.looked = null; // what is steered is to be seen
  await show(await api.step(state.scene.session, body));
  showRate(performance.now() - begun);
  markCode(action);
  if (action.arrow) say(state.scene.sides[0].arrives === false ? `Slot ${state.slot} knows no way ${action.arrow} from here.` : "");
});

function arrow(name) {
  const slot = state.slot === null ? null : state.models[0].slots[state.slot];
  if (slot && !slot.arrows.includes(name)) return say(`Slot ${state.slot} has learnt nothing that moves it ${name}.`);
  act({ arrow: name });
}

function code(number) {
  const slot = state.slot === null ? null : state.models[0].slots[state.slot];
  if (slot && number >= slot.codes.length) return say(`Slot ${state.slot} has ${slot.codes.length} actions.`);
  act({ code: number });
}

function sceneGone(why) {
  sessionStorage.removeItem(KEPT);
  $("gone-why").textContent = `${why}.`;
  if (!$("gone").open) $("gone").showModal();
}

// --- running -----------------------------------------------------------------------------------------------------

async function setRunning(on) {
  if (on === state.running || (on && !state.scene)) return;
  state.running = on;
  press($("run"), on);
  $("run").querySelector("span").textContent = on ? "Pause" : "Run";
  const run = ++state.runs; // who finds another when it wakes was ended meanwhile
  while (state.running && run === state.runs) {
    const begun = performance.now();
    if (!asking) await act(heldAction());
    await new Promise((resolve) => setTimeout(resolve, Math.max(4, RUN_MILLISECONDS - (performance.now() - begun))));
  }
}

// What the key that is down means to the slot that is taken; to stand still if it has no such action.
function heldAction() {
  const slot = state.slot === null ? null : state.models[0].slots[state.slot];
  if (!slot || !state.held) return {};
  return slot.arrows.includes(state.held.arrow) || state.held.code < slot.codes.length ? state.held : {};
}

// --- drawing -----------------------------------------------------------------------------------------------------

async function show(answer) {
  state.scene = answer;
  $("retry").hidden = true;
  await Promise.all(screens.map((screen, i) => screen.show(answer.sides[i], state.models[i].slots.length)));
  $("step").textContent = answer.step;
  $("left").textContent = answer.video_left ? `video for ${answer.video_left} more` : "the video has ended";
  $("undo").disabled = !answer.undo_left;
  $("actions").disabled = !answer.step;
  notice(answer);
  point();
  document.body.dataset.step = answer.step;
}

// What has moved since the scene began, and what keeps it from moving.
function notice({ newest, newest_challenger, trouble }) {
  const said = [];
  if (newest !== state.models[0].version) said.push(`Version ${newest} is there now: Reset takes it.`);
  if (state.models.length > 1 && newest_challenger !== state.models[1].version)
    said.push(`The challenger is version ${newest_challenger} now: Reset takes it.`);
  if (trouble) said.push(trouble);
  $("notice").textContent = $("notice").title = said.join(" ");
}

function setSides(count) {
  const box = $("sides");
  while (screens.length < count) {
    const figure = screens[0].figure.cloneNode(true);
    figure.querySelector(".picture").setAttribute("aria-label", "The scene as the challenger draws it");
    box.append(figure);
    screens.push(new Screen(figure));
    listen(screens.at(-1));
  }
  while (screens.length > count) screens.pop().figure.remove();
}

function nameModels() {
  const name = (model) => `${model.address.replace("models:/", "")}${model.version ? `, version ${model.version}` : ""}`;
  $("served").textContent = name(state.models[0]);
  const roles = state.models.length > 1 ? ["", "challenger: "] : [""];
  state.models.forEach((model, i) => {
    screens[i].figure.querySelector("figcaption").textContent = state.models.length > 1 ? roles[i] + name(model) : "";
  });
}

function listSlots() {
  refill($("slots"), state.models[0].slots.map((slot, k) => {
    const button = document.createElement("button");
    button.style.setProperty("--slot", colourOf(k));
    const swatch = document.createElement("i");
    const note = document.createElement("small");
    note.textContent = slot.entity === null ? "" : `entity ${slot.entity}`;
    button.append(swatch, `Slot ${k}`, note);
    button.dataset.slot = k;
    button.addEventListener("click", () => take(state.slot === k ? null : k));
    button.addEventListener("pointerenter", () => look(slotEverywhere(k)));
    button.addEventListener("pointerleave", () => look(null));
    button.addEventListener("focus", () => { if (button.matches(":focus-visible")) look(slotEverywhere(k)); });
    button.addEventListener("blur", () => look(null));
    return button;
  }));
  take(state.slot, false);
}

function listCodes() {
  const slot = state.slot === null ? null : state.models[0].slots[state.slot];
  const signs = (slot?.arrows ?? []).map((name) => SIGNS[name]).join(" ");
  const other = slot?.other >= 0.005 ? `, others ${Math.round(100 * slot.other)} %` : "";
  $("codes-of").textContent = slot ? `slot ${state.slot}${signs && `, keys ${signs}`}${other}` : "take a slot first";
  $("codes").style.setProperty("--slot", state.slot === null ? "" : colourOf(state.slot));
  refill($("codes"), codeButtons(slot?.codes ?? [], code));
}

// Put other buttons into a box. The focus stays in its place, so that who uses the keys need not come back to it.
function refill(box, buttons) {
  const at = [...box.children].indexOf(document.activeElement);
  box.replaceChildren(...buttons);
  box.children[at]?.focus();
}

function markCode(action) {
  for (const button of $("codes").children) button.classList.toggle("now", button.dataset.code === String(action.code));
}

function showRate(milliseconds) {
  showRate.mean = showRate.mean ? 0.8 * showRate.mean + 0.2 * milliseconds : milliseconds;
  $("rate").textContent = `${Math.round(showRate.mean)} ms a step`;
}

function say(text, alert = false) {
  $("status").textContent = text;
  $("status").title = text;
  $("status").classList.toggle("alert", alert);
}

const press = (button, on) => button.setAttribute("aria-pressed", String(on));

// --- slots -------------------------------------------------------------------------------------------------------

function take(slot, announce = true) {
  state.slot = slot;
  for (const button of $("slots").children) press(button, Number(button.dataset.slot) === slot);
  listCodes();
  point();
  if (announce) say(slot === null ? "No slot is taken." : `Slot ${slot} is yours.`);
}

function look(slots) {
  state.looked = slots;
  point();
}

function point() {
  screens.forEach((screen, i) => {
    const own = i === 0 ? state.slot : state.slot === null ? null : state.scene?.sides[i]?.slot ?? slotEverywhere(state.slot)[i];
    screen.point(own, state.looked?.[i] ?? null);
  });
}

// The slot of each side that is in the same place as a slot of the first.
function slotEverywhere(slot) {
  const [first, ...rest] = screens;
  if (first.masks === null) return screens.map(() => null);
  const place = first.placeOf(slot);
  return [slot, ...rest.map((screen) => screen.slotAt(place))];
}

function listen(screen) {
  screen.screen.addEventListener("pointermove", (event) => {
    const place = screen.placeAt(event);
    look(screens.map((one) => one.slotAt(place)));
  });
  screen.screen.addEventListener("pointerleave", () => look(null));
  screen.screen.addEventListener("click", (event) => {
    if (screens[0].masks !== null) take(screens[0].slotAt(screen.placeAt(event)));
  });
}

// --- controls ----------------------------------------------------------------------------------------------------

function setOthers(others) {
  state.others = others;
  for (const button of $("others").children) press(button, button.dataset.others === others);
}

function setRecording(on) {
  state.recordedFrom = on ? state.scene.step : null;
  press($("record"), on);
  $("record").querySelector("span").textContent = on ? "Save GIF" : "Record GIF";
}

function record() {
  if (!state.scene) return;
  if (state.recordedFrom === null) {
    setRecording(true);
    say("Recording: press again to save.");
    return;
  }
  // When the step that is being taken is there.
  ask(async () => {
    if (state.recordedFrom === null) return; // another scene has begun meanwhile
    const since = Math.min(state.recordedFrom, state.scene.step);
    save(await api.film(state.scene.session, since), `scene-${state.scene.clip + 1}.gif`);
    setRecording(false); // where the server refuses, what was recorded is not lost
    say(`${state.scene.step - since + 1} frames saved.`);
  });
}

const ACTIONS = ["actions.json", "actions-challenger.json"]; // each side has slots, and so actions, of its own
const saveActions = () => ask(async () => {
  const names = ACTIONS.slice(0, screens.length);
  const files = await Promise.all(names.map((_, side) => api.actions(state.scene.session, side)));
  files.forEach((file, side) => save(file, names[side]));
  say(`${names.join(" and ")} saved.`);
});

// A file that the server gave, among the browser's downloads. A link to the server would not say why it refuses.
function save(file, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(file);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000); // the browser reads it after the click
}

const again = () => reset(state.scene?.clip ?? 0, state.scene?.seed ?? 0);
const nextScene = () => reset(((state.scene?.clip ?? -1) + 1) % state.clips, state.scene?.seed ?? 0);
const nextOthers = () => setOthers(OTHERS[(OTHERS.indexOf(state.others) + 1) % OTHERS.length]);
const KEYS = {
  p: () => setRunning(!state.running),
  ".": () => act({}),
  backspace: undo,
  u: undo,
  r: again,
  n: nextScene,
  g: record,
  o: nextOthers,
  escape: () => take(null),
};

document.addEventListener("keydown", (event) => {
  if (event.target instanceof HTMLInputElement || $("gone").open || !state.scene) return;
  if (event.altKey || event.metaKey || (event.ctrlKey && event.key !== "z")) return;
  const name = ARROWS[event.key];
  const number = /^[1-9]$/.test(event.key) ? Number(event.key) - 1 : null;
  if (event.ctrlKey) undo();
  else if (name || number !== null) {
    state.held = name ? { arrow: name } : { code: number };
    if (!state.running) name ? arrow(name) : code(number);
  } else if (KEYS[event.key.toLowerCase()]) {
    if (event.repeat && !["backspace", "u", "."].includes(event.key.toLowerCase())) return;
    KEYS[event.key.toLowerCase()]();
  } else return;
  event.preventDefault();
});
document.addEventListener("keyup", (event) => { if (ARROWS[event.key] || /^[1-9]$/.test(event.key)) state.held = null; });
window.addEventListener("blur", () => { state.held = null; });

$("run").addEventListener("click", KEYS.p);
$("wait").addEventListener("click", KEYS["."]);
$("undo").addEventListener("click", undo);
$("reset").addEventListener("click", again);
$("next").addEventListener("click", nextScene);
$("record").addEventListener("click", record);
$("actions").addEventListener("click", saveActions);
$("others").addEventListener("click", (event) => { if (event.target.dataset.others) setOthers(event.target.dataset.others); });
$("start").addEventListener("submit", (event) => {
  event.preventDefault();
  reset(Number($("clip").value) - 1, Number($("seed").value));
});
$("retry").addEventListener("click", resume);
$("gone").addEventListener("close", () => begin({ clip: state.scene?.clip ?? 0, seed: state.scene?.seed ?? 0 }));

listen(screens[0]);
resume();
