// The page's own script: draws the charts, makes the tables sort, runs the viewers.
"use strict";
const page = JSON.parse(document.getElementById("page-data").textContent);

async function drawCharts() {
  const views = {};
  for (const host of document.querySelectorAll("[data-chart]")) {
    const name = host.dataset.chart;
    const options = { renderer: "svg", actions: false, mode: "vega-lite" };
    views[name] = (await vegaEmbed(host, page.charts[name], options)).view;
  }
  return views;
}

// A select with data-signal sets that signal of the charts that it names.
function connectSelects(views) {
  for (const select of document.querySelectorAll("select[data-signal]")) {
    const show = () => {
      for (const name of select.dataset.charts.split(" "))
        views[name].signal(select.dataset.signal, JSON.parse(select.value)).run();
      sayShift();
    };
    select.addEventListener("change", show);
    show(); // a browser keeps the choice when the page is loaded again
  }
}

// What the marks of the chosen shift say, for who hears the page.
function sayShift() {
  const [shift, severity] = ["shift", "severity"].map((name) => document.querySelector(`[data-signal=${name}]`));
  const marks = document.querySelectorAll("[data-chart=shift_runs] path[aria-roledescription=point]");
  document.getElementById("shift-summary").value =
    `Accuracy, %, under ${shift.selectedOptions[0].text} at severity ${severity.value}: ` +
    `${[...marks].map((mark) => mark.getAttribute("aria-label")).join("; ")}.`;
}

// A chart that was folded away had no width when it was drawn.
function drawUnfolded() {
  for (const details of document.querySelectorAll("details:has([data-chart])"))
    details.addEventListener("toggle", () => window.dispatchEvent(new Event("resize")));
}

function sortTables(library) {
  library.set_or_remove_dark_class();
  for (const table of document.querySelectorAll("table.sortable"))
    new library.default(table, {
      paging: false, order: [], autoWidth: false, language: { search: "Rows with" },
      layout: { topStart: null, topEnd: table.tBodies[0].rows.length > 12 ? "search" : null,
        bottomStart: null, bottomEnd: null },
    });
}

// Attention of the class token to every patch, in per cent.
function attentionOf(model, image, layer, head) {
  const { heads, side, layers } = page.attention;
  const all = page.attention.weights[model], patches = side * side;
  const at = (each) => ((image * layers.length + layer) * heads + each) * patches;
  const chosen = head === "mean" ? [...Array(heads).keys()] : [Number(head)];
  return Array.from({ length: patches }, (_, patch) =>
    chosen.reduce((sum, each) => sum + all[at(each) + patch], 0) / chosen.length / page.attention.steps * 100);
}

function patchRows(weights) {
  const { side } = page.attention;
  return weights.map((weight, patch) => {
    const row = Math.floor(patch / side), column = patch % side;
    return { row: row + 1, column: column + 1, weight, said: `row ${row + 1}, column ${column + 1}: ${weight.toFixed(2)} %`,
      left: column / side, right: (column + 1) / side, top: 1 - row / side, bottom: 1 - (row + 1) / side };
  });
}

function unpackAttention() {
  page.attention.weights = Object.fromEntries(Object.entries(page.attention.packed).map(([model, text]) => {
    const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
    return [model, new Uint16Array(bytes.buffer)];
  }));
}

// The form's choice: the data of each panel and the largest weight of both models; says beneath what is to be seen.
function chosenAttention(form) {
  const [image, student, layer, head] =
    ["image", "student", "layer", "head"].map((name) => form.elements[name].value);
  const teacher = attentionOf("teacher", Number(image), Number(layer), head);
  const ofStudent = attentionOf(student, Number(image), Number(layer), head);
  const difference = ofStudent.map((weight, patch) => weight - teacher[patch]);
  const apart = difference.reduce((sum, weight) => sum + Math.abs(weight), 0) / 2;
  const most = patchRows(teacher).reduce((best, patch) => (patch.weight > best.weight ? patch : best));
  form.elements.summary.value =
    `The teacher looks most at row ${most.row}, column ${most.column} (${most.weight.toFixed(1)} % of its ` +
    `attention). The student places ${apart.toFixed(1)} % of its attention elsewhere than the teacher.`;
  const picture = [{ url: page.attention.images[image] }];
  return {
    most: Math.max(...teacher, ...ofStudent),
    panels: Object.fromEntries(Object.entries({ teacher, student: ofStudent, difference }).map(
      ([panel, weights]) => [`attention_${panel}`, { picture, patches: patchRows(weights) }])),
  };
}

function connectAttentionViewer(form, views) {
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("change", () => {
    const { most, panels } = chosenAttention(form);
    for (const [panel, data] of Object.entries(panels)) {
      for (const [name, rows] of Object.entries(data)) views[panel].data(name, rows);
      views[panel].signal("most", most).run();
    }
  });
}

async function main() {
  unpackAttention();
  const form = document.getElementById("attention-viewer");
  const { most, panels } = chosenAttention(form);
  for (const [panel, datasets] of Object.entries(panels)) {
    const spec = page.charts[panel];
    Object.assign(spec, { datasets, params: spec.params.map((each) => ({ ...each, value: most })) });
  }
  const views = await drawCharts();
  connectSelects(views);
  drawUnfolded();
  connectAttentionViewer(form, views);
  document.documentElement.dataset.drawn = "yes"; // for who waits for it: tests, and printing to a file
}
main();
