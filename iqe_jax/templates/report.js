
"use strict";
// Everything that moves on the page: the threshold with its marks, and the gallery with its viewer. It reads the scores
// from #data and the images from the markup; it sends and fetches nothing.
(() => {
  const $ = (id) => document.getElementById(id);
  const data = JSON.parse($("data").textContent);
  const { scores, labels } = data;
  const low = Math.min(...extremes(scores)), high = Math.max(...extremes(scores));
  const items = [...$("cards").children].map((element) => ({
    element,
    card: element.querySelector(".card"),
    index: Number(element.dataset.index),
    label: Number(element.dataset.label),
    score: Number(element.dataset.score),
    name: element.dataset.name,
    others: JSON.parse(element.dataset.others),
  }));
  let threshold, visible = items, open = -1;

  function extremes(values) {
    let least = Infinity, most = -Infinity;
    for (const value of values) { least = Math.min(least, value); most = Math.max(most, value); }
    return [least, most];
  }
  const shown = (value, digits = 4) => Number(value.toPrecision(digits)).toString();
  const rate = (part, whole) => (whole ? part / whole : NaN);
  const rateText = (value) => (Number.isNaN(value) ? "–" : value.toFixed(3));

  // ---- threshold -------------------------------------------------------------------------------------------------
  function outcome(item) {
    const called = item.score >= threshold ? 1 : 0;
    if (called === item.label) return { key: "right", text: "✓ right" };
    return item.label ? { key: "missed", text: "✕ missed" } : { key: "alarm", text: "✕ false alarm" };
  }
  const wrongness = (item) => (item.label ? 1 : -1) * (threshold - item.score);

  function setThreshold(value) {
    threshold = value;
    let tp = 0, fp = 0, tn = 0, fn = 0;
    for (let i = 0; i < scores.length; i++) {
      if (scores[i] >= threshold) { if (labels[i]) tp++; else fp++; } else if (labels[i]) fn++; else tn++;
    }
    const sensitivity = rate(tp, tp + fn), specificity = rate(tn, tn + fp), precision = rate(tp, tp + fp);
    $("threshold-value").textContent = shown(threshold);
    $("threshold").setAttribute("aria-valuetext", shown(threshold));
    for (const [id, n] of Object.entries({ "n-tp": tp, "n-fp": fp, "n-tn": tn, "n-fn": fn })) $(id).textContent = n;
    $("r-sensitivity").textContent = rateText(sensitivity);
    $("r-specificity").textContent = rateText(specificity);
    $("r-precision").textContent = rateText(precision);
    $("r-f1").textContent = rateText(rate(2 * tp, 2 * tp + fp + fn));
    mark("image-roc", 1 - specificity, sensitivity);
    mark("image-pr", sensitivity, precision);
    const plot = document.querySelector('[data-kind="histogram"]');
    const from = Number(plot.dataset.low), to = Number(plot.dataset.high);
    const line = plot.querySelector(".cross"), at = 46 + 284 * Math.min(1, Math.max(0, (threshold - from) / (to - from)));
    line.setAttribute("x1", at);
    line.setAttribute("x2", at);
    line.setAttribute("visibility", "visible");
    for (const item of items) {
      const found = outcome(item);
      item.outcome = found.key;
      item.card.classList.toggle("wrong", found.key !== "right");
      item.card.querySelector(".badge").textContent = found.text;
      const kind = item.label ? "anomalous" : "normal";
      const text = { right: "rightly called", missed: "missed", alarm: "false alarm" }[found.key];
      item.card.setAttribute("aria-label", `${item.name}, ${kind}, score ${shown(item.score)}, ${text}. Enlarge`);
    }
    arrange();
  }
  function mark(kind, x, y) {
    const marker = document.querySelector(`[data-kind="${kind}"] .marker`);
    const there = !Number.isNaN(x) && !Number.isNaN(y);
    marker.setAttribute("visibility", there ? "visible" : "hidden");
    if (there) { marker.setAttribute("cx", 46 + 284 * x); marker.setAttribute("cy", 256 - 244 * y); }
  }
  const start = data.threshold === null ? (low + high) / 2 : data.threshold;
  function moveTo(value) { // exactly there: the slider's own steps only come near
    $("threshold").value = high > low ? Math.round((1000 * (value - low)) / (high - low)) : 500;
    setThreshold(value);
  }
  const reset = () => moveTo(start);
  $("threshold").addEventListener("input", (event) => setThreshold(low + ((high - low) * event.target.value) / 1000));
  $("threshold-reset").addEventListener("click", reset);
  if (data.threshold === null) $("threshold-reset").textContent = "Middle";
  if ($("threshold-calibrated")) $("threshold-calibrated").addEventListener("click", () => moveTo(data.calibrated));

  // ---- gallery ---------------------------------------------------------------------------------------------------
  const orders = {
    wrong: (a, b) => wrongness(b) - wrongness(a),
    high: (a, b) => b.score - a.score,
    low: (a, b) => a.score - b.score,
    name: (a, b) => a.name.localeCompare(b.name, "en", { numeric: true }),
  };
  function arrange() {
    const wanted = $("outcome").value, kind = $("class").value, part = $("search").value.toLowerCase();
    const fits = (item) =>
      (!kind || item.label === Number(kind)) &&
      (!wanted || item.outcome === wanted || (wanted === "wrong" && item.outcome !== "right")) &&
      item.name.toLowerCase().includes(part);
    const sorted = [...items].sort((a, b) => orders[$("sort").value](a, b) || a.index - b.index);
    visible = sorted.filter(fits);
    const keep = new Set(visible);
    for (const item of sorted) item.element.hidden = !keep.has(item);
    $("cards").append(...sorted.map((item) => item.element));
    $("shown").textContent = `${visible.length} of ${items.length} images`;
    $("nothing").hidden = visible.length > 0;
    rove(visible[0]);
  }
  for (const id of ["sort", "class", "outcome"]) $(id).addEventListener("change", arrange);
  $("search").addEventListener("input", arrange);

  function rove(item) { // one image is in the order of Tab, arrows reach the others
    for (const other of items) other.card.tabIndex = other === item ? 0 : -1;
  }
  function columns() {
    const top = visible.length ? visible[0].element.offsetTop : 0;
    const below = visible.findIndex((item) => item.element.offsetTop > top);
    return below < 0 ? Math.max(visible.length, 1) : below;
  }
  $("cards").addEventListener("keydown", (event) => {
    const at = visible.findIndex((item) => item.card === document.activeElement);
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns(), ArrowDown: columns() }[event.key];
    const to = event.key === "Home" ? 0 : event.key === "End" ? visible.length - 1 : step === undefined ? NaN : at + step;
    if (at < 0 || Number.isNaN(to)) return;
    event.preventDefault();
    if (!visible[to]) return;
    rove(visible[to]);
    visible[to].card.focus();
  });
  $("cards").addEventListener("focusin", (event) => {
    const item = visible.find((other) => other.card === event.target);
    if (item) rove(item);
  });
  $("cards").addEventListener("click", (event) => {
    const card = event.target.closest(".card");
    if (card) enlarge(visible.findIndex((item) => item.card === card));
  });

  // The heat map lies over a copy of the image, and under the outline of the mask: the file holds each picture once.
  for (const item of items) {
    const heat = item.card.querySelector(".heat"), mask = item.card.querySelector(".mask");
    const copyOf = (picture) => Object.assign(picture.cloneNode(), { alt: "" });
    heat.before(copyOf(item.card.querySelector(".image")));
    if (!mask) continue;
    const outline = copyOf(mask);
    outline.className = "outline";
    heat.after(outline);
  }
  const setOutline = () => document.body.classList.toggle("outlined", $("outline").checked);
  $("outline").addEventListener("change", setOutline);
  function setHeat(percent) {
    document.documentElement.style.setProperty("--heat", percent / 100);
    for (const slider of document.querySelectorAll(".heat-slider")) slider.value = percent;
    for (const value of document.querySelectorAll(".heat-value")) value.textContent = `${percent} %`;
  }
  for (const slider of document.querySelectorAll(".heat-slider")) {
    slider.addEventListener("input", () => setHeat(slider.value));
  }

  // ---- viewer ----------------------------------------------------------------------------------------------------
  function enlarge(at) {
    if (!visible[at]) return;
    open = at;
    const item = visible[at];
    $("viewer-name").textContent = item.name;
    $("viewer-place").textContent = `${at + 1} of ${visible.length}`;
    $("viewer-panes").replaceChildren(...[...item.card.querySelectorAll(".pane")].map((pane) => pane.cloneNode(true)));
    const facts = { Class: item.label ? "anomalous" : "normal", Outcome: outcome(item).text, Score: shown(item.score) };
    for (const [name, value] of Object.entries(item.others)) facts[`Score, ${name}`] = shown(value);
    if (data.probabilities) facts.Probability = data.probabilities[item.index].toFixed(3);
    const by = wrongness(item);
    facts[by > 0 ? "Wrong by" : "Right by"] = shown(Math.abs(by), 3);
    $("viewer-facts").replaceChildren(...Object.entries(facts).map(([name, value]) => {
      const pair = document.createElement("div"), term = document.createElement("dt"), text = document.createElement("dd");
      term.textContent = name;
      text.textContent = value;
      pair.append(term, text);
      return pair;
    }));
    $("previous").disabled = at === 0;
    $("next").disabled = at === visible.length - 1;
    if (!$("viewer").open) $("viewer").showModal();
  }
  $("previous").addEventListener("click", () => enlarge(open - 1));
  $("next").addEventListener("click", () => enlarge(open + 1));
  $("close").addEventListener("click", () => $("viewer").close());
  $("viewer").addEventListener("click", (event) => { if (event.target === $("viewer")) $("viewer").close(); });
  $("viewer").addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (step === undefined || event.target.type === "range") return;
    event.preventDefault();
    enlarge(open + step);
  });
  $("viewer").addEventListener("close", () => {
    const item = visible[open];
    if (item) { rove(item); item.card.focus(); }
  });

  addEventListener("beforeprint", () => { for (const details of document.querySelectorAll("details")) details.open = true; });
  setHeat(50);
  setOutline();
  reset();
})();
