// The theme puts the buttons of each piece of code into a landmark without a name; a page has dozens of them.
let count = 0;
const name = () => {
  for (const buttons of document.querySelectorAll("nav.md-code__nav:not([aria-label])"))
    buttons.setAttribute("aria-label", `Code ${++count}`);
};
document.querySelector(".md-search[role=dialog]")?.setAttribute("aria-label", "Search");
new MutationObserver(name).observe(document.body, { childList: true, subtree: true });
name();
