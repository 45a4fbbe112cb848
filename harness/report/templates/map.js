// The map: every tensor a tile in the order of the state dict, nested as the modules are.

const LEAST_AREA = 42; // what even the smallest tensor gets, in pixels
const LEAST_SIDE = 6;
const HEAD = 15;

function treeOf(rows) {
  const root = { name: "", children: new Map(), rows: [] };
  for (const row of rows) {
    const parts = row.key.split(".");
    let node = root;
    for (const part of parts.slice(0, -1)) {
      if (!node.children.has(part)) {
        const child = { name: part, children: new Map() };
        node.children.set(part, child);
      }
      node = node.children.get(part);
    }
    // A key that is also a module's name must not hide it.
    node.children.set(`${parts.at(-1)}\0`, { name: parts.at(-1), row });
  }
  return folded(root);
}

// Modules that hold one thing only are told together with it.
function folded(node) {
  if (node.row) return node;
  const children = [...node.children.values()].map(folded);
  const [only] = children;
  if (children.length === 1 && node.name) return { ...only, name: `${node.name}.${only.name}` };
  for (const child of children) {
    if (/^\d/.test(child.name) && !child.row && node.name) {
      child.name = `${node.name.split(".").at(-1)}.${child.name}`;
    }
  }
  return { name: node.name, children };
}

// Areas by size, but none too small to see: what those take, the others give in proportion.
function weigh(node, area) {
  const leaves = [];
  const collect = (one) => {
    if (one.row) leaves.push(one);
    else one.children.forEach(collect);
  };
  collect(node);
  const least = Math.min(LEAST_AREA, area / (2 * leaves.length));
  leaves.sort((a, b) => a.row.nbytes - b.row.nbytes);
  let rest = area;
  let total = leaves.reduce((sum, leaf) => sum + leaf.row.nbytes, 0);
  for (const leaf of leaves) {
    leaf.weight = Math.max(least, total > 0 ? (rest * leaf.row.nbytes) / total : 0);
    rest -= leaf.weight;
    total -= leaf.row.nbytes;
  }
  const sum = (one) => {
    if (one.row) {
      one.side = LEAST_SIDE;
      one.count = 1;
    } else {
      one.children.forEach(sum);
      one.weight = one.children.reduce((all, child) => all + child.weight, 0);
      one.count = one.children.reduce((all, child) => all + child.count, 0);
      one.side = LEAST_SIDE * Math.ceil(Math.sqrt(one.count)) + 4;
    }
  };
  sum(node);
}

// Parts of a length in proportion to their weights, none below its least while there is room.
function divide(length, weights, leasts) {
  const sum = (numbers) => numbers.reduce((all, number) => all + number, 0);
  if (sum(leasts) >= length) return leasts.map((least) => (least * length) / sum(leasts));
  const small = new Set();
  for (;;) {
    const rest = length - sum(leasts.filter((_, index) => small.has(index)));
    const share = rest / sum(weights.filter((_, index) => !small.has(index)));
    const more = weights.findIndex(
      (weight, index) => !small.has(index) && weight * share < leasts[index],
    );
    if (more < 0)
      return weights.map((weight, index) => (small.has(index) ? leasts[index] : weight * share));
    small.add(more);
  }
}

// A strip treemap (Bederson, Shneiderman & Wattenberg 2002): it keeps the order, and reads as text.
function strips(children, box, place) {
  const weightOf = (some) => some.reduce((sum, child) => sum + child.weight, 0);
  const scale = (box.width * box.height) / weightOf(children);
  const unevenness = (some) => {
    const height = (weightOf(some) * scale) / box.width;
    const aspects = some.map(({ weight }) =>
      Math.max((weight * scale) / height ** 2, height ** 2 / (weight * scale)),
    );
    return aspects.reduce((sum, aspect) => sum + aspect, 0) / aspects.length;
  };
  const found = [[]];
  for (const child of children) {
    const strip = found.at(-1);
    if (strip.length && unevenness([...strip, child]) > unevenness(strip)) found.push([child]);
    else strip.push(child);
  }
  const heights = divide(
    box.height,
    found.map(weightOf),
    found.map((strip) => Math.max(...strip.map(({ side }) => side))),
  );
  let { top } = box;
  found.forEach((strip, index) => {
    const widths = divide(
      box.width,
      strip.map(({ weight }) => weight),
      strip.map(({ side }) => side),
    );
    let { left } = box;
    strip.forEach((child, column) => {
      place(child, { left, top, width: widths[column], height: heights[index] });
      left += widths[column];
    });
    top += heights[index];
  });
}

function at(element, { left, top, width, height }) {
  element.style.left = `${left}px`;
  element.style.top = `${top}px`;
  element.style.width = `${Math.max(1, width)}px`;
  element.style.height = `${Math.max(1, height)}px`;
}

function drawMap(root, rows, tiles) {
  const width = root.clientWidth;
  const height = Math.round(Math.max(320, Math.min(560, width * 0.55, 90 + rows.length * 14)));
  root.style.height = `${height}px`;
  root.querySelector(".frames")?.remove();
  const frames = make("div", { class: "frames", "aria-hidden": "true" });
  root.prepend(frames);
  if (!rows.length || !width) return;
  const tree = treeOf(rows);
  weigh(tree, width * height);

  function place(node, box, module = "") {
    if (node.row) {
      const tile = tiles.get(node.row);
      at(tile, { ...box, width: box.width - 1, height: box.height - 1 });
      const roomy = box.width > 64 && box.height > 22;
      tile.replaceChildren(...(roomy ? [make("span", {}, `${module}${node.name}`)] : []));
      // What is in its place already keeps the focus.
      if (!tile.isConnected) root.append(tile);
      return;
    }
    // A module of nothing but tensors needs no name beside their labels.
    const isInnermost = node.children.every((child) => child.row);
    const headed = !isInnermost && box.width > 56 && box.height > 44;
    const edged = headed || (box.width > 24 && box.height > 24);
    let inner = box;
    if (edged) {
      const frame = make("div", { class: "frame" });
      at(frame, { ...box, width: box.width - 1, height: box.height - 1 });
      const fits = 6.2 * node.name.length < box.width - 8;
      if (headed) frame.append(make("span", {}, fits ? node.name : node.name.split(".").at(-1)));
      frames.append(frame);
      const head = headed ? HEAD : 1;
      inner = {
        left: box.left + 2,
        top: box.top + head + 1,
        width: box.width - 4,
        height: box.height - head - 3,
      };
    }
    const prefix = isInnermost ? `${node.name}.` : "";
    strips(node.children, inner, (child, its) => place(child, its, prefix));
  }

  strips(tree.children, { left: 0, top: 0, width, height }, (child, its) => place(child, its));
}
