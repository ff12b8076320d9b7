// Paper has no clicks: what is folded is printed as well, except configs.
addEventListener("beforeprint", () => {
  for (const part of document.querySelectorAll("details:not([open]):not(.config)")) {
    part.open = true;
    part.classList.add("was-closed");
  }
});
addEventListener("afterprint", () => {
  for (const part of document.querySelectorAll("details.was-closed")) {
    part.open = false;
    part.classList.remove("was-closed");
  }
});
