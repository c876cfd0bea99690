// Preact's elements written as template literals: no build step stands between these files and the browser.
import { h } from "./vendor/preact.js";
import htm from "./vendor/htm.js";

export const html = htm.bind(h);
