(() => {
  "use strict";
  const map = document.querySelector(".map");
  if (!map) return;
  const data = JSON.parse(document.getElementById("map-data").textContent);
  const svg = map.querySelector(".plot svg"), ring = svg.querySelector(".ring");
  const tip = map.querySelector(".tip"), text = tip.querySelector("span"), canvas = tip.querySelector("canvas");
  const sheets = [...map.querySelectorAll(".sprite")], points = [...svg.querySelectorAll(".tile")];
  const places = points.map((point) => [Number(point.getAttribute("cx")), Number(point.getAttribute("cy"))]);
  const reach = 16;
  let shown = -1;

  function draw(row) {
    const place = row % data.each, cell = data.cell;
    const left = (place % data.columns) * cell, top = Math.floor(place / data.columns) * cell;
    canvas.getContext("2d").drawImage(
      sheets[Math.floor(row / data.each)], left, top, cell, cell, 0, 0, canvas.width, canvas.height);
  }

  function show(row) {
    if (row === shown) return;
    shown = row;
    tip.hidden = row < 0;
    ring.setAttribute("cx", row < 0 ? -20 : places[row][0]);
    ring.setAttribute("cy", row < 0 ? -20 : places[row][1]);
    if (row < 0) return;
    const label = data.labels[row];
    text.textContent =
      `${label < 0 ? "unlabelled" : data.classes[label]}, cluster ${data.clusters[row]}, ${data.keys[row]}`;
    draw(row);
    const box = svg.getBoundingClientRect(), scale = box.width / svg.viewBox.baseVal.width;
    const x = places[row][0] * scale, y = places[row][1] * scale;
    // beside the point, on the side that has room, and never outside the map
    const left = x + 14 + tip.offsetWidth <= box.width ? x + 14 : x - 14 - tip.offsetWidth;
    tip.style.left = `${Math.max(0, Math.min(left, box.width - tip.offsetWidth))}px`;
    tip.style.top = `${Math.max(0, Math.min(y - tip.offsetHeight / 2, box.height - tip.offsetHeight))}px`;
  }

  function under(event) {
    const box = svg.getBoundingClientRect(), scale = svg.viewBox.baseVal.width / box.width;
    const x = (event.clientX - box.left) * scale, y = (event.clientY - box.top) * scale;
    let best = -1, least = (reach * Math.max(1, scale)) ** 2;
    places.forEach(([a, b], row) => {
      const distance = (a - x) ** 2 + (b - y) ** 2;
      if (distance < least && !points[row].classList.contains("dim")) [best, least] = [row, distance];
    });
    return best;
  }

  // The nearest point that lies more ahead than aside.
  function beyond(row, dx, dy) {
    let best = row, least = Infinity;
    places.forEach(([a, b], other) => {
      const ahead = (a - places[row][0]) * dx + (b - places[row][1]) * dy;
      const aside = Math.abs((a - places[row][0]) * dy) + Math.abs((b - places[row][1]) * dx);
      if (other === row || ahead <= 0 || aside > ahead || points[other].classList.contains("dim")) return;
      if (ahead + 2 * aside < least) [best, least] = [other, ahead + 2 * aside];
    });
    return best;
  }

  svg.addEventListener("pointermove", (event) => show(under(event)));
  svg.addEventListener("click", (event) => show(under(event)));
  svg.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") show(-1); });
  svg.addEventListener("blur", () => show(-1));
  svg.addEventListener("focus", () => { if (svg.matches(":focus-visible") && shown < 0 && points.length) show(0); });
  const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  svg.addEventListener("keydown", (event) => {
    if (event.key === "Escape") show(-1);
    if (!(event.key in steps) || !points.length) return;
    event.preventDefault();
    show(shown < 0 ? 0 : beyond(shown, ...steps[event.key]));
  });

  // Buttons of a legend show one group alone; returns the function that does it.
  function legend(root, marks) {
    const buttons = [...root.querySelectorAll(".legend button")];
    function only(chosen) {
      for (const button of buttons) button.setAttribute("aria-pressed", String(button === chosen));
      for (const mark of marks) mark.classList.toggle("dim", Boolean(chosen) && !mark.classList.contains(chosen.dataset.only));
      show(-1);
    }
    for (const button of buttons) {
      button.addEventListener("click", () => only(button.getAttribute("aria-pressed") === "true" ? null : button));
    }
    return only;
  }
  const only = legend(map, points), slides = document.querySelector(".slides");
  if (slides) legend(slides, [...slides.querySelectorAll(".place")]);
  for (const choice of map.querySelectorAll("input[name=colour]")) {
    choice.addEventListener("change", () => {
      map.classList.toggle("by-class", choice.value === "class");
      map.classList.toggle("by-cluster", choice.value === "cluster");
      only(null);
    });
  }
})();
