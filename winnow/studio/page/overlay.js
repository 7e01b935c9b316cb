// A picture with its kept tokens clear, merged ones half clear, dropped ones dim, merged groups and evidence drawn in.

const SMALLEST = 448; // pixels of the shorter side, so that tokens can be seen
const GAP = 8;
const GROUPS = ["#5fb3f0", "#ff8a4c", "#3cc79a", "#f08bcb", "#f4f06a", "#ffffff"];

/** Only the picture. */
export function plain(canvas, picture) {
  canvas.width = picture.naturalWidth;
  canvas.height = picture.naturalHeight;
  canvas.getContext("2d").drawImage(picture, 0, 0);
}

/**
 * One panel for each grid of tokens (a thumbnail and its tiles), side by side.
 * found: an answer of the server; stage: one of its stages; show: {groups, evidence}.
 */
export function draw(canvas, picture, found, stage, show) {
  const panels = Math.max(1, ...found.panel.map((at) => at + 1));
  const zoom = Math.max(1, SMALLEST / Math.min(picture.naturalWidth, picture.naturalHeight));
  const wide = Math.round(picture.naturalWidth * zoom);
  const high = Math.round(picture.naturalHeight * zoom);
  canvas.width = panels * (wide + GAP) - GAP;
  canvas.height = high;
  const pen = canvas.getContext("2d");
  const kept = new Set(stage.kept);
  for (let panel = 0; panel < panels; panel++) {
    pen.save();
    pen.translate(panel * (wide + GAP), 0);
    pen.beginPath();
    pen.rect(0, 0, wide, high);
    pen.clip();
    const boxes = found.boxes.map(([a, b, c, d], at) =>
      found.panel[at] === panel && a < c ? [a * wide, b * high, c * wide, d * high].map(Math.round) : null);
    one(pen, picture, wide, high, boxes, kept, stage.owner);
    if (show.groups) groups(pen, boxes, kept, stage.owner, wide);
    if (show.evidence) evidence(pen, found.evidence, wide, high);
    pen.restore();
  }
}

function one(pen, picture, wide, high, boxes, kept, owner) {
  pen.drawImage(picture, 0, 0, wide, high);
  const dim = new Path2D();
  const half = new Path2D();
  const unseen = new Path2D();
  unseen.rect(0, 0, wide, high);
  boxes.forEach((box, at) => {
    if (!box) return;
    const [a, b, c, d] = box;
    unseen.rect(a, b, c - a, d - b);
    if (!kept.has(at)) (owner[at] < 0 ? dim : half).rect(a, b, c - a, d - b);
  });
  pen.fillStyle = "rgba(14, 15, 18, 0.9)";
  pen.fill(unseen, "evenodd");
  grey(pen, dim, wide, high);
  pen.fillStyle = "rgba(20, 22, 26, 0.45)";
  pen.fill(half);
  edges(pen, boxes, kept, Math.max(2, Math.round(Math.min(wide, high) / 224)));
}

function grey(pen, path, wide, high) {
  pen.save();
  pen.clip(path);
  pen.globalCompositeOperation = "saturation";
  pen.fillStyle = "#777";
  pen.fillRect(0, 0, wide, high);
  pen.globalCompositeOperation = "source-over";
  pen.fillStyle = "rgba(24, 26, 30, 0.66)";
  pen.fillRect(0, 0, wide, high);
  pen.restore();
}

/** A line around what is kept: the sides of kept tokens that no kept neighbour shares. */
function edges(pen, boxes, kept, width) {
  const sides = new Map();
  boxes.forEach((box, at) => {
    if (!box || !kept.has(at)) return;
    const [a, b, c, d] = box;
    for (const side of [[a, b, c, b], [a, d, c, d], [a, b, a, d], [c, b, c, d]]) {
      const name = side.join();
      if (sides.has(name)) sides.delete(name);
      else sides.set(name, side);
    }
  });
  pen.strokeStyle = "#ffd60a";
  pen.lineWidth = width;
  pen.beginPath();
  for (const [a, b, c, d] of sides.values()) {
    pen.moveTo(a, b);
    pen.lineTo(c, d);
  }
  pen.stroke();
}

/** Each merged token is tied to the kept one whose row it reached most. */
function groups(pen, boxes, kept, owner, wide) {
  const centre = ([a, b, c, d]) => [(a + c) / 2, (b + d) / 2];
  const order = new Map([...kept].sort((x, y) => x - y).map((at, nth) => [at, nth]));
  pen.lineWidth = Math.max(1.2, wide / 380);
  pen.globalAlpha = 0.85;
  owner.forEach((to, at) => {
    if (to < 0 || to === at || !boxes[at] || !boxes[to]) return;
    const [x, y] = centre(boxes[at]);
    pen.strokeStyle = pen.fillStyle = GROUPS[(order.get(to) ?? 0) % GROUPS.length];
    pen.beginPath();
    pen.moveTo(x, y);
    pen.lineTo(...centre(boxes[to]));
    pen.stroke();
    pen.beginPath();
    pen.arc(x, y, Math.max(2, wide / 220), 0, 7);
    pen.fill();
  });
  pen.globalAlpha = 1;
}

function evidence(pen, shares, wide, high) {
  for (const [a, b, c, d] of shares) {
    const box = [a * wide - 2, b * high - 2, (c - a) * wide + 4, (d - b) * high + 4];
    pen.lineWidth = 5;
    pen.strokeStyle = "#ffffff";
    pen.strokeRect(...box);
    pen.lineWidth = 3;
    pen.strokeStyle = "#ff2d96";
    pen.strokeRect(...box);
  }
}
