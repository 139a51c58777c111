// An image that is dropped, pasted or chosen, and the hole painted on it. `props.picture` is a small copy as data URL,
// `props.value` the hole as PNG data URL, white on black, in the copy's size. `props.upload` is the id of the element
// with the upload button, which sends the file itself to the server if it has at most `props.megabytes`.
const PAINT = "#ff3d7f", UNDO_STEPS = 20;
const [root, drop, stage, img, canvas] = ["", " .drop", " .stage", " img", " canvas"].map((part) => element.querySelector(".picture" + part));
const [file, size] = element.querySelectorAll("input"), complaint = root.querySelector(".complaint");
const draw = canvas.getContext("2d", { willReadFrequently: true });
let tool = "brush", history = [], start = null, last = null;

const snapshot = () => draw.getImageData(0, 0, canvas.width, canvas.height);

function choose(name) {
  tool = name;
  for (const button of element.querySelectorAll("[data-tool]"))
    button.classList.toggle("chosen", button.dataset.tool === name);
}

function hand_over() {
  if (!snapshot().data.some((level) => level)) return void (props.value = null);
  const mask = Object.assign(document.createElement("canvas"), { width: canvas.width, height: canvas.height });
  const context = mask.getContext("2d");
  context.drawImage(canvas, 0, 0);
  for (const [mode, colour] of [["source-in", "white"], ["destination-over", "black"]]) {
    context.globalCompositeOperation = mode;
    context.fillStyle = colour;
    context.fillRect(0, 0, mask.width, mask.height);
  }
  props.value = mask.toDataURL("image/png");
}

async function show() {
  root.classList.toggle("plain", !props.painted);
  root.classList.toggle("full", !!props.picture);
  history = [];
  if (!props.picture) return;
  img.src = props.picture;
  await img.decode();
  Object.assign(canvas, { width: img.naturalWidth, height: img.naturalHeight });
  const height = props.painted ? 26 : 14; // rem, at most; small images are enlarged
  stage.style.width = `min(100%, ${height * img.naturalWidth / img.naturalHeight}rem)`;
  if (!props.value) return;
  const hole = new Image();
  hole.src = props.value;
  await hole.decode();
  draw.drawImage(hole, 0, 0, canvas.width, canvas.height);
  const pixels = snapshot(), [red, green, blue] = PAINT.match(/\w\w/g).map((digits) => parseInt(digits, 16));
  for (let i = 0; i < pixels.data.length; i += 4)
    pixels.data.set(pixels.data[i] < 128 ? [0, 0, 0, 0] : [red, green, blue, 255], i);
  draw.putImageData(pixels, 0, 0);
}

function send(files) {
  if (!files.length) return;
  const [{ name, size: bytes }] = files, megabytes = bytes / 2 ** 20;
  complaint.textContent = megabytes <= props.megabytes ? "" :
    `${name}: ${megabytes.toFixed(1)} MB, expected at most ${props.megabytes}; reduce its size first`;
  if (complaint.textContent) return;
  const input = document.querySelector(`#${props.upload} input[type=file]`);
  input.files = files;
  input.dispatchEvent(new Event("change", { bubbles: true }));
}

function point(event) {
  const box = canvas.getBoundingClientRect();
  return [(event.clientX - box.left) * canvas.width / box.width, (event.clientY - box.top) * canvas.height / box.height];
}

function stroke(to) {
  draw.globalCompositeOperation = tool === "eraser" ? "destination-out" : "source-over";
  draw.strokeStyle = draw.fillStyle = PAINT;
  if (tool === "box") {
    draw.putImageData(history.at(-1), 0, 0);
    const [x, y] = start.map((s, i) => Math.round(Math.min(s, to[i])));
    draw.fillRect(x, y, Math.round(Math.max(start[0], to[0])) - x, Math.round(Math.max(start[1], to[1])) - y);
  } else {
    draw.lineCap = draw.lineJoin = "round";
    draw.lineWidth = Math.max(1, size.value / 100 * Math.min(canvas.width, canvas.height));
    draw.beginPath();
    draw.moveTo(...last);
    draw.lineTo(...to);
    draw.stroke();
  }
  draw.globalCompositeOperation = "source-over";
  last = to;
}

canvas.addEventListener("pointerdown", (event) => {
  if (event.button) return;
  canvas.setPointerCapture(event.pointerId);
  history = [...history.slice(1 - UNDO_STEPS), snapshot()];
  start = last = point(event);
  stroke(start);
});
canvas.addEventListener("pointermove", (event) => start && stroke(point(event)));
for (const end of ["pointerup", "pointercancel"])
  canvas.addEventListener(end, () => { if (start) { start = null; hand_over(); } });

const actions = {
  open: () => file.click(),
  undo: () => { if (history.length) { draw.putImageData(history.pop(), 0, 0); hand_over(); } },
  clear: () => { history.push(snapshot()); draw.clearRect(0, 0, canvas.width, canvas.height); hand_over(); },
};
element.addEventListener("click", (event) => {
  const { tool: name, do: action } = event.target.dataset;
  if (name) choose(name);
  else if (action) actions[action]();
  else if (!props.picture && drop.contains(event.target)) actions.open();
});
file.addEventListener("change", () => { send(file.files); file.value = ""; });
drop.addEventListener("keydown", (event) => { if (event.key === "Enter" && !props.picture) actions.open(); });
drop.addEventListener("paste", (event) => send(event.clipboardData.files));
for (const [name, over] of [["dragover", true], ["dragleave", false], ["drop", false]])
  drop.addEventListener(name, (event) => { event.preventDefault(); drop.classList.toggle("over", over); });
drop.addEventListener("drop", (event) => send(event.dataTransfer.files));

watch("picture value".split(" "), show); // a name alone in quotes would count as an event of the component
choose("brush");
show();
