"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const STORE = `votes:${data.salt}`;
const state = { blind: false, shown: data.at_once, at: 0 };
let list = []; // the rows that the controls leave, in their order
let votes = {}; // by model and row: 1 where the left image is better, 0 the right, 0.5 neither
try { votes = JSON.parse(localStorage.getItem(STORE)) || {}; } catch { /* not kept over reloads */ }

const score = (row, model) => row.scores[data.primary]?.[data.models.indexOf(model)] ?? null;
const gain = (row) => (score(row, $("model").value) ?? 0) - (score(row, data.baseline) ?? 0);
const key = (row) => `${$("model").value} ${row.number}`;

/** The models whose images are shown, from the left: two in an order of their own where blind. */
function sides(row) {
  if (!state.blind) return data.models;
  const pair = [data.baseline, $("model").value];
  return swapped(row) ? pair.reverse() : pair;
}

/** A coin for each row, from its seed and number; the same at every visit. */
function swapped(row) {
  let x = Math.imul(row.number + 1, 0x9e3779b1) ^ Math.imul((row.seed ?? 0) + data.salt, 0x85ebca6b);
  for (const shift of [16, 13, 16]) x = Math.imul(x ^ (x >>> shift), 0xc2b2ae35);
  return ((x >>> 16) & 1) === 1;
}

function make(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function picture(row, model, side, full) {
  const place = data.models.indexOf(model);
  const said = state.blind ? ["left", "right"][side] : model;
  const image = make("img", { alt: `${said}: ${row.prompt || "(empty prompt)"}`, loading: "lazy" });
  image.onload = () => image.classList.toggle("tiny", image.naturalWidth < 128);
  image.src = full && data.linked && !state.blind ? link(row, place) : row.thumbs[place];
  if (full && data.linked && state.blind) image.src = link(row, place);
  return [image, said, score(row, model)];
}

const link = (row, place) => "../" + row.images[place].split("/").map(encodeURIComponent).join("/");

function figures(row, full, index) {
  const better = state.blind ? 0 : Math.sign(gain(row));
  return sides(row).map((model, side) => {
    const [image, said, value] = picture(row, model, side, full);
    const place = data.models.indexOf(model);
    const frame = make("a", { href: "#" }, image);
    // Hidden, an address would say which model it is.
    if (data.linked && !state.blind) Object.assign(frame, { href: link(row, place), target: "_blank" });
    if (!full) frame.onclick = (event) => {
      if (event.ctrlKey || event.metaKey || event.shiftKey) return;
      event.preventDefault();
      zoom(index);
    };
    const inside = full && (state.blind || !data.linked) ? image : frame;
    const caption = make("figcaption", {}, make("b", { textContent: said }));
    if (!state.blind && value !== null)
      caption.append(make("span", { textContent: value.toPrecision(4) }));
    const won = model === $("model").value ? better > 0 : model === data.baseline && better < 0;
    return make("figure", { className: won ? "won" : "" }, inside, caption);
  });
}

function vote(row, label) {
  votes[key(row)] = label;
  try { localStorage.setItem(STORE, JSON.stringify(votes)); } catch { /* as above */ }
  for (const button of document.querySelectorAll(`[data-row="${row.number}"]`))
    button.setAttribute("aria-pressed", String(Number(button.dataset.label) === label));
  tally();
}

function ballot(row) {
  if (!state.blind) return [];
  const names = [["left", 1], ["tie", 0.5], ["right", 0]];
  return [make("div", { className: "votes" }, ...names.map(([name, label]) => {
    const button = make("button", { type: "button", textContent: name });
    Object.assign(button.dataset, { row: row.number, label });
    button.setAttribute("aria-pressed", String(votes[key(row)] === label));
    button.onclick = () => vote(row, label);
    return button;
  }))];
}

function card(row, index) {
  const two = make("div", { className: "two" }, ...figures(row, false, index));
  two.style.setProperty("--sides", Math.min(sides(row).length, 3));
  const facts = [row.category, row.seed === null ? null : `seed ${row.seed}`];
  return make("article", { className: "pair" },
    make("p", { className: "prompt", textContent: row.prompt || "(empty prompt)" }),
    make("p", { className: "facts", textContent: facts.filter(Boolean).join(", ") }),
    two, ...ballot(row));
}

const ORDERS = {
  change: (a, b) => Math.abs(gain(b)) - Math.abs(gain(a)),
  wins: (a, b) => gain(b) - gain(a),
  losses: (a, b) => gain(a) - gain(b),
  number: (a, b) => a.number - b.number,
};

function select() {
  const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const [category, winner] = [$("category").value, state.blind ? "" : $("winner").value];
  list = data.rows.filter((row) =>
    words.every((word) => row.prompt.toLowerCase().includes(word)) &&
    (!category || row.category === category) &&
    (!winner || Math.sign(gain(row)) === Number(winner)));
  list.sort(ORDERS[$("order").value]);
  state.shown = data.at_once;
  draw();
}

function draw() {
  $("cards").replaceChildren(...list.slice(0, state.shown).map(card));
  $("more").hidden = list.length <= state.shown;
  const shown = Math.min(list.length, state.shown);
  $("count").textContent = `${list.length.toLocaleString("en")} of ${data.rows.length.toLocaleString("en")} comparisons`
    + (shown < list.length ? `, ${shown.toLocaleString("en")} of them shown` : "");
  tally();
}

const voted = () => data.rows.filter((row) => key(row) in votes);

function tally() {
  const rows = voted();
  $("save").disabled = !rows.length;
  let text = rows.length ? `${rows.length} voted on` : "";
  if (rows.length && !state.blind) {
    const model = rows.map((row) => (swapped(row) ? votes[key(row)] : 1 - votes[key(row)]));
    const count = (label) => model.filter((one) => one === label).length;
    text += `: ${count(1)} for ${$("model").value}, ${count(0)} for ${data.baseline}, ${count(0.5)} ties`;
  }
  $("tally").textContent = text;
}

function save() {
  const blind = state.blind;
  state.blind = true; // the sides on which the votes were cast
  const lines = voted().map((row) => {
    const [left, right] = sides(row).map((model) => row.images[data.models.indexOf(model)]);
    return JSON.stringify({ prompt: row.prompt, image_0: left, image_1: right, label_0: votes[key(row)] });
  });
  state.blind = blind;
  const address = URL.createObjectURL(new Blob([lines.join("\n") + "\n"], { type: "application/jsonl" }));
  make("a", { href: address, download: "votes.jsonl" }).click();
  setTimeout(() => URL.revokeObjectURL(address), 1000);
}

function zoom(index) {
  const row = list[index];
  if (!row) return;
  state.at = index;
  $("position").textContent = `${index + 1} of ${list.length}`;
  $("previous").disabled = index === 0;
  $("next").disabled = index === list.length - 1;
  $("zoom-prompt").textContent = row.prompt || "(empty prompt)";
  $("zoom-images").replaceChildren(...figures(row, true, index));
  $("zoom-images").style.setProperty("--sides", Math.min(sides(row).length, 3));
  $("zoom-votes").replaceChildren(...ballot(row));
  if (!$("zoom").open) $("zoom").showModal();
}

function toggle() {
  state.blind = !state.blind;
  $("blind").setAttribute("aria-pressed", String(state.blind));
  $("winner").disabled = state.blind;
  select();
  if ($("zoom").open) zoom(Math.min(state.at, list.length - 1));
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, select")) return;
  const label = { 1: 1, 2: 0, 0: 0.5 }[event.key];
  if (event.key.toLowerCase() === "b") toggle();
  else if (!$("zoom").open) return;
  else if (event.key === "ArrowLeft") zoom(state.at - 1);
  else if (event.key === "ArrowRight") zoom(state.at + 1);
  else if (state.blind && label !== undefined) {
    vote(list[state.at], label);
    zoom(state.at + 1);
  }
});
for (const id of ["category", "model", "winner", "order"]) $(id).onchange = select;
$("search").oninput = select;
$("controls").onsubmit = (event) => event.preventDefault();
$("blind").onclick = toggle;
$("save").onclick = save;
$("more").onclick = () => { state.shown += data.at_once; draw(); };
$("previous").onclick = () => zoom(state.at - 1);
$("next").onclick = () => zoom(state.at + 1);
$("close").onclick = () => $("zoom").close();
select();
