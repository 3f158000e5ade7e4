// The buttons of what a slot can do: for each discovered action its key, where it moves the slot, and how often it is used.

const PLACES = 9;
const LEAST_MOTION = 0.03; // of the frame's side: what moves less is drawn short, however fast it is among its like

// A button for each code { motion, usage, consistency }, that calls `choose` with its number.
export function codeButtons(codes, choose) {
  const fastest = Math.max(LEAST_MOTION, ...codes.map(({ motion }) => Math.hypot(...motion)));
  const buttons = codes.map((one, number) => codeButton(one, number, fastest, choose));
  // Room for nine, so that nothing moves when another slot is taken.
  while (buttons.length < PLACES) {
    const empty = document.createElement("div");
    empty.className = "empty";
    buttons.push(empty);
  }
  return buttons;
}

function codeButton(one, number, fastest, choose) {
  const button = document.createElement("button");
  const key = document.createElement("kbd");
  key.textContent = number < PLACES ? number + 1 : "";
  const share = document.createElement("span");
  share.className = "share";
  share.textContent = `${Math.round(100 * one.usage)} %`;
  const bar = document.createElement("span");
  bar.className = "use";
  bar.style.setProperty("--share", `${Math.round(100 * one.usage)}%`);
  const arrow = motionArrow(one.motion, fastest);
  arrow.style.opacity = 0.3 + 0.7 * one.consistency; // a faint arrow: it depends on where the slot stands
  button.append(key, arrow, share, bar);
  button.title = one.consistency < 0.5 ? "What it does depends on where the slot stands" : "";
  button.dataset.code = number;
  button.setAttribute("aria-label", `Action ${number + 1}: ${inWords(one.motion, fastest)}, ${share.textContent} of its steps`);
  button.addEventListener("click", () => choose(number));
  return button;
}

// An arrow from the middle, as long as the slot moves in relation to its fastest action; a ring where it stays.
function motionArrow([x, y], fastest) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "-12 -12 24 24");
  svg.setAttribute("aria-hidden", "true");
  const draw = (kind, attributes) => {
    const part = document.createElementNS(svg.namespaceURI, kind);
    for (const [name, value] of Object.entries(attributes)) part.setAttribute(name, value);
    svg.append(part);
  };
  const length = 10 * (Math.hypot(x, y) / fastest);
  if (length < 1.5) {
    draw("circle", { r: 2.2, fill: "none", "stroke-width": 1.4 });
    return svg;
  }
  const turn = `rotate(${(Math.atan2(y, x) * 180) / Math.PI})`;
  draw("line", { x1: -length / 2, x2: length / 2 - 1, "stroke-width": 1.8, "stroke-linecap": "round", transform: turn });
  const tip = length / 2 + 1.5;
  draw("path", { d: `M${tip} 0 l-4.5 -3 v6 z`, stroke: "none", transform: turn });
  return svg;
}

function inWords([x, y], fastest) {
  if (Math.hypot(x, y) < 0.15 * fastest) return "stays";
  return Math.abs(x) > Math.abs(y) ? (x > 0 ? "moves right" : "moves left") : y > 0 ? "moves down" : "moves up";
}
