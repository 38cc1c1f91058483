// The image as it was sent, its kept patches lit, the [CLS] attention as a map over it.

const LONGEST = 900; // canvas pixels a side, whatever the image has
const DIM = "rgb(12 16 24 / 0.78)";
const FRAME = "rgb(255 255 255 / 0.9)";
const PADDING = "rgb(128 132 140 / 0.35)";
// From dark violet over red to yellow: brighter is more, for every kind of colour vision.
const RAMP = [[20, 11, 53], [101, 21, 110], [188, 55, 84], [242, 125, 46], [252, 236, 140]];

/** Colour of a share in [0, 1]. */
export function heatColor(share) {
  const place = Math.min(Math.max(share, 0), 1) * (RAMP.length - 1);
  const low = Math.min(Math.floor(place), RAMP.length - 2);
  return RAMP[low].map((c, i) => Math.round(c + (RAMP[low + 1][i] - c) * (place - low)));
}

/** What of the plane is shown: the image and, where the checkpoint pads, the bars around it. */
function viewOf(image, explanation) {
  const [left, top, right, bottom] = explanation?.box ?? [0, 0, 0, 0];
  const x = Math.min(0, left), y = Math.min(0, top);
  return {
    x, y,
    width: Math.max(image.width, right) - x,
    height: Math.max(image.height, bottom) - y,
  };
}

/** Edges of patch number `index`, in the image's pixels. */
export function patchEdges({ grid: [rows, columns], box: [left, top, right, bottom] }, index) {
  const row = Math.floor(index / columns), column = index % columns;
  const x = (c) => left + ((right - left) * c) / columns;
  const y = (r) => top + ((bottom - top) * r) / rows;
  return [x(column), y(row), x(column + 1), y(row + 1)];
}

/**
 * Draws the picture.
 *
 * @param {HTMLCanvasElement} canvas
 * @param {ImageBitmap} image
 * @param {object|null} explanation of the server, for this image
 * @param {{dims: boolean, heat: number}} look whether to dim, and how strong the map is, 0 to 1
 */
export function draw(canvas, image, explanation, { dims, heat }) {
  const view = viewOf(image, explanation);
  const scale = LONGEST / Math.max(view.width, view.height);
  canvas.width = Math.max(1, Math.round(view.width * scale));
  canvas.height = Math.max(1, Math.round(view.height * scale));
  const context = canvas.getContext("2d");
  const rect = ([x0, y0, x1, y1]) => {
    const [a, b] = [(x0 - view.x) * scale, (y0 - view.y) * scale].map(Math.round);
    const [c, d] = [(x1 - view.x) * scale, (y1 - view.y) * scale].map(Math.round);
    return [a, b, c - a, d - b];
  };
  context.fillStyle = PADDING;
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.imageSmoothingQuality = "high";
  context.drawImage(image, ...rect([0, 0, image.width, image.height]));
  if (!explanation) return;
  if (heat > 0) drawHeat(context, explanation, heat, rect);
  if (dims) drawDim(context, explanation, rect, canvas);
  if (leavesOut(explanation, image)) drawFrame(context, rect(explanation.box));
}

/** Whether the checkpoint crops a part of the image off. */
export function leavesOut({ box: [left, top, right, bottom] }, image) {
  return left > 1 || top > 1 || right < image.width - 1 || bottom < image.height - 1;
}

function drawFrame(context, [x, y, width, height]) {
  context.lineWidth = 3;
  context.strokeStyle = FRAME;
  context.setLineDash([12, 8]);
  context.strokeRect(x + 1.5, y + 1.5, width - 3, height - 3);
}

function drawHeat(context, explanation, strength, rect) {
  const scores = explanation.cls_attention;
  const most = Math.max(...scores);
  if (!(most > 0)) return;
  context.globalAlpha = strength;
  scores.forEach((score, index) => {
    // Attention is a few high values over many low ones: the root shows both.
    context.fillStyle = `rgb(${heatColor(Math.sqrt(score / most)).join(" ")})`;
    context.fillRect(...rect(patchEdges(explanation, index)));
  });
  context.globalAlpha = 1;
}

function drawDim(context, explanation, rect, canvas) {
  const lit = new Path2D();
  lit.rect(0, 0, canvas.width, canvas.height);
  for (const index of explanation.kept) lit.rect(...rect(patchEdges(explanation, index)));
  context.fillStyle = DIM;
  context.fill(lit, "evenodd");
}
