"use strict";
// The data of the page as objects, and the words and numbers that are made of them.

const DATA = JSON.parse(document.getElementById("data").textContent);
const STAGES = DATA.stages;
const ROWS = DATA.rows.map((values, index) => unpackRow(values, DATA.extras[index]));
const LEVELS = 8;
const SEVERITY = [...DATA.kinds, "identical", "ignored"];

const ABOUT = { ...DATA.about, identical: "the same bytes", ignored: "skipped by --ignore" };

function named(columns, values) {
  return Object.fromEntries(columns.map((name, index) => [name, values[index]]));
}

function unpackRow(values, extra) {
  const row = named(DATA.columns.row, values);
  // What more there is may have been left out, where it was too much for a page.
  row.extra = extra && named(DATA.columns.extra, extra);
  for (const side of ["expected", "actual"]) row[side] = DATA.words[row[side]] ?? null;
  row.findings = row.findings.map((one) => {
    const finding = named(DATA.columns.finding, one);
    if (finding.difference) finding.difference = unpackDifference(finding.difference);
    return finding;
  });
  row.difference = row.findings.map((finding) => finding.difference).find(Boolean) ?? null;
  row.family = DATA.families[row.kind];
  row.isTensor = row.expected !== null || row.actual !== null;
  row.search =
    `${row.key} ${row.findings.map((finding) => finding.actual_key ?? "").join(" ")}`.toLowerCase();
  return row;
}

function unpackDifference(values) {
  const difference = named(DATA.columns.difference, values);
  // JSON lacks NaN and the infinities: they come as words.
  for (const name of ["rms", "ratio"]) difference[name] = Number(difference[name]);
  for (const name of ["max_abs", "min_atol"]) difference[name] = difference[name].map(Number);
  const [atol, rtol, exact] = DATA.tolerances[difference.tolerance];
  return { ...difference, atol, rtol, exact };
}

// Of a strip, the values that its signs stand for, to a tenth of a decade.
function stripValues([top, signs]) {
  return [...signs].map((sign) => {
    if (sign === DATA.strip.zero) return 0;
    if (sign === DATA.strip.endless) return Infinity;
    return Number(top) * 10 ** (-DATA.strip.tenths.indexOf(sign) / 10);
  });
}

// The step on the log scale: 0 up to a thousandth of the tolerance, 4 from the tolerance on.
function level(ratio) {
  if (Number.isNaN(ratio)) return null;
  if (ratio === 0) return 0;
  return Math.max(0, Math.min(LEVELS - 1, Math.floor(Math.log10(ratio)) + 4));
}

function shade(family, ratio) {
  const step = ["close", "undecided", "different"].includes(family) ? level(ratio) : null;
  return step === null ? family : `${family} l${step}`;
}

function shadeOf(row) {
  return shade(row.family, row.difference ? row.difference.ratio : NaN);
}

function fails(row) {
  return !["identical", "ignored", "close", "undecided"].includes(row.kind);
}

// Numbers.

function count(number) {
  return number.toLocaleString("en");
}

function plural(number, noun) {
  return `${count(number)} ${noun}${number === 1 ? "" : "s"}`;
}

function short(value) {
  if (Number.isNaN(value)) return "–";
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
  return value === 0 ? "0" : value.toExponential(1);
}

function general(value) {
  return value >= 1e-3 || value === 0 ? String(value) : value.toExponential();
}

function statistic(name, value) {
  if (name.startsWith("num_")) return count(value);
  const number = Number(value);
  return number && Math.abs(number) < 1e-3 ? number.toExponential() : String(value);
}

function times(ratio) {
  if (Number.isNaN(ratio)) return "–";
  if (!Number.isFinite(ratio)) return "∞";
  if (ratio === 0) return "0";
  return ratio >= 0.01 && ratio < 1000 ? String(Number(ratio.toPrecision(2))) : short(ratio);
}

function interval([low, high]) {
  if (low === high) return Number.isFinite(low) ? low.toExponential(2) : short(low);
  if (!Number.isFinite(high)) return low ? `at least ${short(low)}` : "unknown";
  return low ? `${short(low)} to ${short(high)}` : `up to ${short(high)}`;
}

function bytes(nbytes) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (nbytes >= 1024 && unit < units.length - 1) {
    nbytes /= 1024;
    unit += 1;
  }
  return `${unit ? nbytes.toFixed(nbytes < 10 ? 1 : 0) : nbytes} ${units[unit]}`;
}

function typeOf(row) {
  if (row.expected === null || row.actual === null) return row.expected ?? row.actual ?? "";
  return row.expected === row.actual ? row.expected : `${row.expected} → ${row.actual}`;
}

function inWords(row) {
  const words = [row.key, row.kind];
  if (row.difference) {
    const { rms, ratio } = row.difference;
    if (!Number.isNaN(rms)) words.push(`rms ${short(rms)}, ${times(ratio)} times the tolerance`);
    else words.push("by an unknown amount");
  }
  return words.join(", ");
}

// Elements: text never becomes markup.

function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === false || value === null) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

// A long name breaks between its parts first.
function breakable(name) {
  return name.split(/(?<=[._])/).flatMap((part) => [part, make("wbr")]);
}

function mark(family) {
  return make("span", { class: `mark ${family}`, "aria-hidden": "true" });
}
