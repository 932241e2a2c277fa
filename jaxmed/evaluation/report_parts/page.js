"use strict";
for (const box of document.querySelectorAll(".slices")) {
  const input = box.querySelector("input");
  const strip = box.querySelector("img");
  const told = box.querySelector(".which");
  const names = JSON.parse(box.dataset.names);
  const show = () => {
    const place = Number(input.value);
    strip.style.transform = `translateY(${(-100 * place) / names.length}%)`;
    input.setAttribute("aria-valuetext", names[place]);
    told.textContent = names[place];
  };
  input.addEventListener("input", show);
  box.querySelector(".window").addEventListener("click", () => input.focus());
  box.querySelector(".control").hidden = false;
  show();
}
// On paper nothing can be unfolded.
let folded = [];
addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("details:not([open])")];
  for (const one of folded) one.open = true;
});
addEventListener("afterprint", () => {
  for (const one of folded) one.open = false;
});
