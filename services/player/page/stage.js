// A model's picture of the scene, and over it what its slots claim.

// The colours of slots are those of the reports.
const WHEEL = [
  "#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf",
  "#aec7e8", "#ffbb78", "#98df8a", "#ff9896", "#c5b0d5", "#c49c94", "#f7b6d2", "#c7c7c7", "#dbdb8d", "#9edae5",
];

export const colourOf = (slot) => WHEEL[slot % WHEEL.length];

const bytesOf = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));

export class Screen {
  constructor(figure) {
    this.figure = figure;
    this.screen = figure.querySelector(".screen");
    this.picture = figure.querySelector(".picture");
    this.overlay = figure.querySelector(".overlay");
    this.masks = null; // one Uint8Array [P] a slot
    this.grid = 0;
    new ResizeObserver(() => this.drawOverlay()).observe(this.screen);
  }

  // Draw a side of the scene: { frame: PNG in base64, masks: uint8 [K, P] in base64, or null }.
  async show(side, slots) {
    const blob = new Blob([bytesOf(side.frame)], { type: "image/png" });
    // Pixels must come out as the model drew them, whatever the screen's colours.
    const bitmap = await createImageBitmap(blob, { colorSpaceConversion: "none", premultiplyAlpha: "none" });
    if (this.picture.width !== bitmap.width || this.picture.height !== bitmap.height) {
      this.picture.width = bitmap.width;
      this.picture.height = bitmap.height;
    }
    this.picture.getContext("2d").drawImage(bitmap, 0, 0);
    bitmap.close();
    this.masks = null;
    if (side.masks !== null) {
      const all = bytesOf(side.masks);
      const patches = all.length / slots;
      this.grid = Math.round(Math.sqrt(patches));
      this.masks = Array.from({ length: slots }, (_, k) => all.subarray(k * patches, (k + 1) * patches));
    }
    this.drawOverlay();
  }

  // Which slots to point out: the one that is taken gets an outline, the one that is looked at is filled too.
  point(taken, looked) {
    this.taken = taken;
    this.looked = looked;
    this.drawOverlay();
  }

  // Where a pointer event is, [x, y] in shares of the picture's side: models may differ in their patches.
  placeAt(event) {
    const box = this.screen.getBoundingClientRect();
    return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
  }

  // Where a slot claims most, as `placeAt`.
  placeOf(slot) {
    const patch = this.masks[slot].indexOf(Math.max(...this.masks[slot]));
    return [(patch % this.grid + 0.5) / this.grid, (Math.floor(patch / this.grid) + 0.5) / this.grid];
  }

  // The slot that claims most of what is at a place; null for a model without slots.
  slotAt(place) {
    if (this.masks === null) return null;
    const [x, y] = place.map((share) => Math.min(this.grid - 1, Math.max(0, Math.floor(share * this.grid))));
    return this.winner(y * this.grid + x);
  }

  // The slot that claims most of a patch.
  winner(patch) {
    let best = 0;
    this.masks.forEach((mask, k) => { if (mask[patch] > this.masks[best][patch]) best = k; });
    return best;
  }

  drawOverlay() {
    const box = this.screen.getBoundingClientRect();
    const side = Math.round(box.width * devicePixelRatio);
    if (this.overlay.width !== side) this.overlay.width = this.overlay.height = side;
    const pen = this.overlay.getContext("2d");
    pen.clearRect(0, 0, side, side);
    if (this.masks === null) return;
    if (this.looked != null) this.fill(pen, side, this.looked);
    for (const slot of new Set([this.taken, this.looked])) if (slot != null) this.outline(pen, side, slot);
  }

  fill(pen, side, slot) {
    const size = side / this.grid;
    pen.fillStyle = colourOf(slot);
    this.masks[slot].forEach((claim, patch) => {
      const [x, y] = [patch % this.grid, Math.floor(patch / this.grid)];
      pen.globalAlpha = 0.55 * (claim / 255);
      const [left, top] = [Math.round(x * size), Math.round(y * size)];
      pen.fillRect(left, top, Math.round((x + 1) * size) - left, Math.round((y + 1) * size) - top);
    });
    pen.globalAlpha = 1;
  }

  outline(pen, side, slot) {
    const size = side / this.grid;
    const owns = (x, y) =>
      x >= 0 && y >= 0 && x < this.grid && y < this.grid && this.winner(y * this.grid + x) === slot;
    const path = new Path2D();
    const edge = (x1, y1, x2, y2) => { path.moveTo(x1 * size, y1 * size); path.lineTo(x2 * size, y2 * size); };
    for (let y = 0; y < this.grid; y++) {
      for (let x = 0; x < this.grid; x++) {
        if (!owns(x, y)) continue;
        if (!owns(x, y - 1)) edge(x, y, x + 1, y);
        if (!owns(x, y + 1)) edge(x, y + 1, x + 1, y + 1);
        if (!owns(x - 1, y)) edge(x, y, x, y + 1);
        if (!owns(x + 1, y)) edge(x + 1, y, x + 1, y + 1);
      }
    }
    pen.lineCap = "square";
    // A light rim lets the line be seen on any picture.
    for (const [colour, width] of [["#ffffffcc", 5], [colourOf(slot), 3]]) {
      pen.strokeStyle = colour;
      pen.lineWidth = width * devicePixelRatio;
      pen.stroke(path);
    }
  }
}
