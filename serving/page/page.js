// Wires the page: one post, one or two panels that label it.

import { getModels, readKey, storeKey } from "./api.js";
import { EXAMPLES } from "./examples.js";
import { Panel } from "./panel.js";
import { curlOf, pythonOf } from "./snippets.js";

const $ = (id) => document.getElementById(id);
const chosen = (name) => document.querySelector(`input[name="${name}"]:checked`).value;
const TYPING_MS = 500;

const panels = [];
let served = null;
let image = null; // {url, name, bitmap, facts}
let newest = 0; // images are read in the background: the last one chosen wins

const page = {
  post: () => ({ image, text: $("text").value }),
  look: () => ({ dims: $("dims").checked, heat: Number($("heat").value) / 100 }),
  changed: showSnippet,
  say: (sentence) => {
    $("announcement").textContent = sentence;
  },
};

async function connect() {
  try {
    served = await getModels();
  } catch (error) {
    $("server").textContent = error.message;
    $("server").classList.add("failed");
    return;
  }
  $("server").classList.remove("failed");
  $("request").hidden = false;
  // A key may be for some adapters only, or for the base alone.
  const base = served.data.find((card) => !card.parent);
  const count = served.data.filter((card) => card.parent).length;
  $("server").textContent = [
    ...(base ? [base.id] : []),
    `${count} adapter${count === 1 ? "" : "s"}`,
    `${served.patches} patches an image`,
  ].join(", ");
  for (const panel of panels.splice(0)) panel.stop();
  panels.push(new Panel("A", served, page));
  showPanels();
  relabel(0);
}

// The post

async function takeFile(file, name = file.name || "image") {
  const turn = ++newest;
  const url = await new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
  // What the browser cannot draw is sent all the same: the server says what is wrong with it.
  const bitmap = await createImageBitmap(file).catch(() => null);
  if (turn !== newest) return;
  const size = bitmap ? `${bitmap.width} × ${bitmap.height}, ` : "";
  image = { url, name, bitmap, facts: `${size}${sizeOf(file.size)}` };
  showImage();
  relabel(0);
}

const sizeOf = (bytes) => (bytes < 1e6 ? `${Math.ceil(bytes / 1e3)} kB` : `${(bytes / 1e6).toFixed(1)} MB`);

function showImage() {
  const is = image !== null;
  $("thumbnail").hidden = !image?.bitmap;
  if (image?.bitmap) $("thumbnail").src = image.url;
  else $("thumbnail").removeAttribute("src");
  $("drop-hint").hidden = is;
  $("image-facts").hidden = !is;
  $("image-facts").textContent = is ? `${image.name}, ${image.facts}` : "";
  $("remove").hidden = !is;
  $("choose").textContent = is ? "Replace" : "Choose an image";
  $("drop").classList.toggle("filled", is);
}

function removeImage() {
  newest += 1;
  image = null;
  $("file").value = "";
  showImage();
  relabel(0);
  $("file").focus();
}

function relabel(pause) {
  showSnippet();
  for (const panel of panels) panel.later(pause);
}

async function takeExample(example) {
  const response = await fetch(`page/examples/${example.file}`);
  const blob = await response.blob();
  $("text").value = example.text;
  await takeFile(blob, example.file);
}

function showExamples() {
  $("examples").replaceChildren(...EXAMPLES.map((example) => {
    const item = document.createElement("li");
    const button = Object.assign(document.createElement("button"), { type: "button" });
    const picture = Object.assign(new Image(), { src: `page/examples/${example.file}`, alt: example.alt });
    button.append(picture, Object.assign(document.createElement("span"), { textContent: example.title }));
    button.addEventListener("click", () => takeExample(example));
    item.append(button);
    return item;
  }));
}

function firstImage(transfer) {
  return [...(transfer?.files ?? [])].find((file) => file.type.startsWith("image/")) ?? transfer?.files?.[0];
}

function listenForImages() {
  $("file").addEventListener("change", () => $("file").files[0] && takeFile($("file").files[0]));
  $("remove").addEventListener("click", removeImage);
  document.addEventListener("paste", (event) => {
    const file = firstImage(event.clipboardData);
    if (file) takeFile(file);
  });
  const over = (is) => document.body.classList.toggle("over", is);
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    over(true);
  });
  document.addEventListener("dragleave", (event) => event.relatedTarget === null && over(false));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    over(false);
    const file = firstImage(event.dataTransfer);
    if (file) takeFile(file);
  });
}

// Panels

function showPanels() {
  const pair = $("compare").checked;
  if (pair && panels.length === 1) {
    const second = new Panel("B", served, page);
    const ratio = Number(panels[0].body().retention_ratio);
    second.copy(panels[0], ratio > 0.4 ? 0.4 : 1);
    panels.push(second);
    second.later(0);
  } else if (!pair && panels.length === 2) {
    panels.pop().stop();
    document.querySelector('input[name="which"][value="0"]').checked = true;
  }
  $("panels").replaceChildren(...panels.map((panel) => panel.root));
  $("panels").classList.toggle("pair", pair);
  $("which").hidden = !pair;
  for (const panel of panels) {
    const name = panel.root.querySelector(".panel-name");
    name.hidden = !pair;
    name.textContent = panel.name;
  }
  showSnippet();
}

// The request as code

function showSnippet() {
  const panel = panels[Number(chosen("which"))] ?? panels[0];
  if (!panel) return;
  const url = new URL(".", location.href).href.replace(/\/$/, "");
  const context = { url, file: image?.name ?? null, hasKey: readKey() !== "" };
  const write = chosen("language") === "curl" ? curlOf : pythonOf;
  $("snippet").textContent = write(panel.body(), context);
}

async function copySnippet() {
  try {
    await navigator.clipboard.writeText($("snippet").textContent);
    told("Copied");
  } catch { // no clipboard without TLS
    getSelection().selectAllChildren($("snippet"));
    told("Selected: press Ctrl+C");
  }
}

function told(word) {
  $("copy").textContent = word;
  page.say(word);
  setTimeout(() => {
    $("copy").textContent = "Copy";
  }, 2000);
}

// The rest

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  document.querySelector(`input[name="theme"][value="${theme}"]`).checked = true;
}

function listen() {
  listenForImages();
  $("text").addEventListener("input", () => relabel(TYPING_MS));
  $("text").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) relabel(0);
  });
  $("run").addEventListener("click", () => (served ? panels.forEach((panel) => panel.run()) : connect()));
  $("compare").addEventListener("change", () => served && showPanels());
  $("dims").addEventListener("change", () => panels.forEach((panel) => panel.redraw()));
  $("heat").addEventListener("input", () => {
    const share = $("heat").value;
    $("heat").setAttribute("aria-valuetext", share === "0" ? "off" : `${share} %`);
    panels.forEach((panel) => panel.redraw());
  });
  for (const radio of document.querySelectorAll('input[name="which"], input[name="language"]'))
    radio.addEventListener("change", showSnippet);
  for (const radio of document.querySelectorAll('input[name="theme"]'))
    radio.addEventListener("change", () => {
      setTheme(radio.value);
      localStorage.setItem("sieve.theme", radio.value);
    });
  $("copy").addEventListener("click", copySnippet);
  $("key").value = readKey();
  $("key").addEventListener("change", () => {
    storeKey($("key").value.trim());
    connect();
  });
}

const THEMES = ["auto", "light", "dark"];
const stored = localStorage.getItem("sieve.theme");
setTheme(THEMES.includes(stored) ? stored : "auto");
showExamples();
listen();
connect();
