// The outputs: every place a bar in the order of execution, its height how far it is off.

const MIN_SEGMENT = 10;

// A numbered layer stands for itself, if much happens in it.
function segmentsOf(rows) {
  const paths = rows.map((row) => row.key.split(":")[0].replace(/@\d+$/, "").split("."));
  const layers = paths.map((path) =>
    path.slice(0, path.findIndex((part) => /^\d+$/.test(part)) + 1).join("."),
  );
  const sizes = new Map();
  for (const layer of layers) sizes.set(layer, (sizes.get(layer) ?? 0) + 1);
  return paths.map((path, index) =>
    layers[index] && sizes.get(layers[index]) >= MIN_SEGMENT
      ? layers[index]
      : path.slice(0, 2).join("."),
  );
}

function drawOrder(root, rows, bars) {
  root.style.height = "auto";
  let segment = null;
  let name = null;
  const segments = segmentsOf(rows);
  rows.forEach((row, index) => {
    const its = segments[index];
    if (its !== name) {
      name = its;
      segment = make("div", { class: "bars", role: "presentation" });
      root.append(
        make(
          "div",
          { class: "segment", role: "group", "aria-label": name },
          make("span", { class: "name", "aria-hidden": "true" }, name),
          segment,
        ),
      );
    }
    segment.append(bars.get(row));
  });
}
