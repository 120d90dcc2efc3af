"use strict";
(() => {
  const root = document.documentElement;
  const tip = document.getElementById("tip");

  // Light or dark: as the system has it, until the reader chooses.
  const button = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const showTheme = () => button.setAttribute("aria-pressed", String(isDark()));
  try {
    const kept = localStorage.getItem("ngc-jax-theme");
    if (kept === "light" || kept === "dark") root.dataset.theme = kept;
  } catch { /* a page from a file may have no storage */ }
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    try { localStorage.setItem("ngc-jax-theme", root.dataset.theme); } catch { /* as above */ }
    showTheme();
  });
  system.addEventListener("change", showTheme);
  button.hidden = false;
  showTheme();

  // The numbers of what the pointer or the focus is on. Screen readers have them as the element's name.
  const lines = (element) => (element.dataset.tip || element.getAttribute("aria-label") || "").split("; ");
  const show = (element, x, y) => {
    tip.replaceChildren(...lines(element).map((line) => {
      const row = document.createElement("div");
      row.textContent = line;
      return row;
    }));
    tip.hidden = false;
    const box = element.getBoundingClientRect();
    const [width, height] = [tip.offsetWidth, tip.offsetHeight];
    const left = x === undefined ? box.left : x + 14;
    const above = (y === undefined ? box.top : y) - height - 10;
    tip.style.left = `${Math.max(6, Math.min(left, innerWidth - width - 6))}px`;
    tip.style.top = `${above > 4 ? above : (y === undefined ? box.bottom : y + 10) + 8}px`;
  };
  const mates = (element) => {
    if (element.dataset.group) {
      return [...element.closest("svg").querySelectorAll("[data-group]")].filter((one) => one.dataset.group === element.dataset.group);
    }
    const text = element.closest(".text");
    return text && element.dataset.at ? [...text.querySelectorAll(`[data-at="${element.dataset.at}"]`)] : [];
  };
  let marked = [];
  const mark = (element) => {
    marked.forEach((one) => one.classList.remove("on"));
    marked = element ? mates(element) : [];
    marked.forEach((one) => one.classList.add("on"));
  };
  const tipped = (event) => (event.target instanceof Element ? event.target.closest("[data-tip]") : null);
  const hide = () => { tip.hidden = true; mark(null); };
  document.addEventListener("pointermove", (event) => {
    const element = tipped(event);
    if (!element) { if (!tip.hidden && !tipped({ target: document.activeElement })) hide(); return; }
    show(element, event.clientX, event.clientY);
    mark(element);
  });
  document.addEventListener("focusin", (event) => {
    const element = tipped(event);
    if (element) { show(element); mark(element); } else hide();
  });
  document.addEventListener("focusout", hide);
  // What has the focus keeps its numbers beside it.
  document.addEventListener("scroll", () => {
    if (tip.hidden) return;
    const element = tipped({ target: document.activeElement });
    if (element) show(element); else hide();
  }, { passive: true, capture: true });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });

  // One tab stop for each text and each map; arrow keys move within.
  for (const box of document.querySelectorAll(".roving")) {
    const items = [...box.querySelectorAll('[role="option"], [role="gridcell"]')];
    const columns = Number(box.dataset.columns || 0);
    const moves = {
      ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns || 1, ArrowUp: -columns || -1,
      PageDown: columns ? 0 : 10, PageUp: columns ? 0 : -10,
    };
    const go = (to) => {
      items.forEach((item, at) => {
        item.tabIndex = at === to ? 0 : -1;
        if (item.hasAttribute("aria-selected")) item.setAttribute("aria-selected", String(at === to));
      });
      items[to].focus({ preventScroll: false });
    };
    box.addEventListener("keydown", (event) => {
      const at = items.indexOf(document.activeElement);
      if (at < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
      let to = at;
      if (event.key === "Home") to = columns ? at - (at % columns) : 0;
      else if (event.key === "End") to = columns ? at - (at % columns) + columns - 1 : items.length - 1;
      else if (event.key in moves) to = at + moves[event.key];
      else return;
      event.preventDefault();
      if (to >= 0 && to < items.length && to !== at) go(to);
    });
    box.addEventListener("pointerdown", (event) => {
      const item = event.target.closest('[role="option"], [role="gridcell"]');
      if (item) { event.preventDefault(); go(items.indexOf(item)); }
    });
  }

  // Tokens by stability or by potential.
  for (const set of document.querySelectorAll(".switch")) {
    set.hidden = false;
    set.addEventListener("change", (event) => {
      set.closest(".part").classList.toggle("by-potential", event.target.value === "potential");
    });
  }
})();
