"""The page behind ``/docs``: shows ``/openapi.json``, uses nothing from elsewhere, inserts text only as text."""

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>vllmd API</title>
<style>
:root { color-scheme: light dark; --line: #8885; --soft: #8882 }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
details { border: 1px solid var(--line); border-radius: 6px; margin: .3rem 0 }
summary { padding: .4rem .7rem; cursor: pointer }
details > div { padding: 0 1rem 1rem }
code, pre { font: 13px/1.45 ui-monospace, monospace }
pre { background: var(--soft); padding: .6rem; border-radius: 6px; overflow: auto; white-space: pre-wrap }
.method { display: inline-block; width: 5rem; font-weight: 700 }
.GET { color: #2a7ae2 } .POST { color: #1d8a4e } .DELETE { color: #c4322b } .PUT { color: #a86a00 }
.soft { opacity: .75 } td, th { padding: .1rem .8rem .1rem 0; text-align: left; vertical-align: top }
input { font: inherit; width: 100%; max-width: 24rem }
</style>
<h1>vllmd API</h1>
<p class="soft" id="about"></p>
<p><label>Key for trying GET requests: <input id="key" type="password" autocomplete="off"></label></p>
<main id="main">Loading openapi.json</main>
<script>
"use strict";
const main = document.getElementById("main");
function element(name, text, parent, className) {
  const made = document.createElement(name);
  if (text !== undefined && text !== null) made.textContent = text;
  if (className) made.className = className;
  if (parent) parent.append(made);
  return made;
}
function resolved(schema, all, depth) {
  if (!schema || typeof schema !== "object" || depth > 6) return schema;
  if (schema.$ref) return resolved(all[schema.$ref.split("/").pop()], all, depth + 1);
  if (Array.isArray(schema)) return schema.map(each => resolved(each, all, depth + 1));
  return Object.fromEntries(Object.entries(schema).map(([name, value]) => [name, resolved(value, all, depth + 1)]));
}
function shown(schema) {
  if (!schema) return "";
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.enum) return schema.enum.map(each => JSON.stringify(each)).join(" | ");
  if (schema.anyOf) return schema.anyOf.map(shown).join(" | ");
  if (schema.type === "array") return shown(schema.items) + "[]";
  if (schema.properties) {
    const must = new Set(schema.required || []);
    const rows = Object.entries(schema.properties).map(([name, value]) =>
      "  " + name + (must.has(name) ? "" : "?") + ": " + shown(value).replaceAll("\\n", "\\n  "));
    return "{\\n" + rows.join("\\n") + "\\n}";
  }
  return [schema.type || "anything"].flat().join(" | ");
}
function contents(holder, title, content, all) {
  for (const [type, body] of Object.entries(content || {})) {
    element("p", title + " (" + type + ")", holder);
    element("pre", shown(resolved(body.schema, all, 0)), holder);
  }
}
function attempt(holder, path) {
  const button = element("button", "Send", holder), output = element("pre", "", holder);
  output.hidden = true;
  button.onclick = async () => {
    const key = document.getElementById("key").value;
    output.hidden = false;
    try {
      const answer = await fetch(path, { headers: key ? { Authorization: "Bearer " + key } : {} });
      output.textContent = answer.status + " " + answer.statusText + "\\n" + (await answer.text());
    } catch (error) { output.textContent = String(error); }
  };
}
function operation(path, method, spec, all) {
  const holder = element("details", null, main), line = element("summary", null, holder);
  element("span", method, line, "method " + method);
  element("code", path, line);
  element("span", "  " + (spec.summary || ""), line, "soft");
  const inner = element("div", null, holder);
  element("p", spec.description || "", inner);
  if (spec.parameters) {
    const table = element("table", null, inner);
    for (const each of spec.parameters) {
      const row = element("tr", null, table);
      element("code", each.name + (each.required ? "" : "?"), element("td", null, row));
      element("td", each.in + ", " + shown(each.schema), row);
      element("td", each.description || "", row, "soft");
    }
  }
  contents(inner, "Takes", spec.requestBody && spec.requestBody.content, all);
  for (const [status, answer] of Object.entries(spec.responses))
    if (status !== "default") contents(inner, "Answers " + status, answer.content, all);
  const endless = path === "/admin/events" || path.includes("{");
  if (method === "GET" && !endless) attempt(inner, path);
}
fetch("/openapi.json").then(answer => answer.json()).then(doc => {
  main.textContent = "";
  document.getElementById("about").textContent = "Version " + doc.info.version + ". " + doc.info.description;
  const tags = new Map();
  for (const [path, methods] of Object.entries(doc.paths))
    for (const [method, spec] of Object.entries(methods)) {
      const tag = (spec.tags || ["vllmd"])[0];
      if (!tags.has(tag)) tags.set(tag, []);
      tags.get(tag).push([path, method.toUpperCase(), spec]);
    }
  for (const [tag, found] of tags) {
    element("h2", tag, main);
    for (const [path, method, spec] of found) operation(path, method, spec, doc.components.schemas);
  }
}).catch(error => { main.textContent = "openapi.json cannot be had: " + error; });
</script>
</html>
"""
