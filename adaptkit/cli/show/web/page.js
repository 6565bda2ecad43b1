"use strict";

const value = (row, column) => {
  const cell = row.cells[column];
  return cell.dataset.value === undefined ? cell.textContent.toLowerCase() : Number(cell.dataset.value);
};

const sort = (table, column) => {
  const heads = [...table.tHead.rows[0].cells];
  const up = heads[column].getAttribute("aria-sort") !== "ascending";
  heads.forEach((head) => head.removeAttribute("aria-sort"));
  heads[column].setAttribute("aria-sort", up ? "ascending" : "descending");
  const rows = [...table.tBodies[0].rows].map((row) => [value(row, column), row]);
  const order = ([a], [b]) => (typeof a === "number" && typeof b === "number" ? a - b
    : String(a).localeCompare(String(b), "en", { numeric: true }));
  rows.sort(up ? order : (a, b) => order(b, a));
  table.tBodies[0].append(...rows.map(([, row]) => row));
};

document.querySelectorAll("table.sorted").forEach((table) => {
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    head.firstElementChild.addEventListener("click", () => sort(table, column));
  });
});

const files = [...document.querySelectorAll("#files tbody tr")].map((row) => {
  const section = document.getElementById(row.dataset.file);
  return { row, section, text: `${row.textContent} ${section.dataset.words}`.toLowerCase() };
});
const field = document.querySelector("input");
const told = document.getElementById("told");

const search = () => {
  const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
  let count = 0;
  files.forEach(({ row, section, text }) => {
    const fits = words.every((word) => text.includes(word));
    row.hidden = section.hidden = !fits;
    count += fits;
  });
  told.textContent = words.length ? `${count} of ${files.length}` : "";
};
field.addEventListener("input", search);
search();

const open = () => {
  const meant = document.getElementById(location.hash.slice(1));
  if (meant instanceof HTMLDetailsElement) {
    meant.open = true;
    meant.scrollIntoView();
  }
};
window.addEventListener("hashchange", open);
open();
