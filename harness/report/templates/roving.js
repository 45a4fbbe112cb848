// One tab stop for many elements (`.item`): keys move among those that are not left out.
function roving(root, { spatial, onopen, onmove }) {
  const reachable = ".item:not(.out)";
  let current = null;

  function settle(item) {
    if (current) current.tabIndex = -1;
    current = item;
    if (current) current.tabIndex = 0;
  }

  function nearest(items, up) {
    const here = current.getBoundingClientRect();
    const middle = (here.left + here.right) / 2;
    let best = null;
    let least = Infinity;
    for (const item of items) {
      const there = item.getBoundingClientRect();
      const gap = up ? here.top - there.bottom : there.top - here.bottom;
      if (gap < -1) continue;
      const aside = Math.max(0, there.left - middle, middle - there.right);
      if (gap + 2 * aside < least) [least, best] = [gap + 2 * aside, item];
    }
    return best;
  }

  root.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey || !event.target.classList.contains("item"))
      return;
    const items = [...root.querySelectorAll(reachable)];
    settle(event.target);
    const at = items.indexOf(current);
    const notable = (item) => !["identical", "ignored"].includes(item.row.kind);
    const upDown = (up) => (spatial ? nearest(items, up) : items[at + (up ? -1 : 1)]);
    const targets = {
      ArrowRight: () => spatial && items[at + 1],
      ArrowLeft: () => spatial && items[at - 1],
      ArrowDown: () => upDown(false),
      ArrowUp: () => upDown(true),
      Home: () => items[0],
      End: () => items.at(-1),
      PageDown: () => items.slice(at + 1).find(notable),
      PageUp: () => items.slice(0, Math.max(0, at)).findLast(notable),
    };
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      onopen(current.row, current, true);
    } else if (event.key in targets) {
      event.preventDefault();
      const target = targets[event.key]();
      if (!target) return;
      settle(target);
      target.focus({ preventScroll: spatial });
      target.scrollIntoView({ block: "nearest" });
      onmove(target.row, target);
    }
  });
  root.addEventListener("click", (event) => {
    const item =
      event.target.closest(".item") ?? event.target.closest("tr")?.querySelector(".item");
    if (!item) return;
    settle(item);
    item.focus({ preventScroll: true });
    onopen(item.row, item, false);
  });
  return {
    reset() {
      const stays = current?.isConnected && current.matches(reachable);
      settle(stays ? current : root.querySelector(reachable));
    },
  };
}
