// Renders /openapi.json: every operation with the fields of its body. It loads nothing else.
"use strict";

let schemas = {};

function element(name, text, ...children) {
  const made = document.createElement(name);
  if (text) made.textContent = text;
  made.append(...children);
  return made;
}

function resolved(schema) {
  return schema.$ref ? schemas[schema.$ref.split("/").pop()] : schema;
}

/** A type in words, such as "text or list of integer". */
function typeOf(schema) {
  if (schema.$ref) return schema.$ref.split("/").pop();
  if (schema.anyOf) {
    const kinds = schema.anyOf.map(typeOf).filter((kind) => kind !== "null");
    return [...new Set(kinds)].join(" or ");
  }
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(", ");
  if ("const" in schema) return JSON.stringify(schema.const);
  if (schema.type === "array") return `list of ${schema.items ? typeOf(schema.items) : "any"}`;
  return schema.type === "string" ? "text" : schema.type || "any";
}

/** The limits of a type, such as "1 to 128". */
function limitsOf(schema) {
  const limits = [schema, ...(schema.anyOf || [])].flatMap((each) => {
    const found = [];
    if ("minimum" in each) found.push(`at least ${each.minimum}`);
    if ("maximum" in each) found.push(`at most ${each.maximum}`);
    if ("minItems" in each) found.push(`at least ${each.minItems} items`);
    if ("maxItems" in each) found.push(`at most ${each.maxItems} items`);
    return found;
  });
  return [...new Set(limits)].join(", ");
}

function table(schema) {
  const rows = Object.entries(schema.properties || {}).map(([name, field]) => {
    const needed = (schema.required || []).includes(name) ? "required" : "";
    const given = field.default === null || field.default === undefined;
    const more = [needed, limitsOf(field), given ? "" : `default ${JSON.stringify(field.default)}`];
    return element("tr", "",
      element("td", name), element("td", typeOf(field)),
      element("td", more.filter(Boolean).join(", ")), element("td", field.description));
  });
  return element("table", "", element("tbody", "", ...rows));
}

function operation(path, method, about) {
  const section = element("section", "", element("h2", `${method.toUpperCase()} ${path}`));
  if (about.description) section.append(element("p", about.description));
  const body = about.requestBody?.content["application/json"]?.schema;
  if (body) section.append(table(resolved(body)));
  for (const field of about.parameters || []) {
    section.append(element("p", `${field.name} (${field.in}): ${typeOf(field.schema)}`));
  }
  return section;
}

async function render() {
  const api = await (await fetch("openapi.json")).json();
  schemas = api.components?.schemas || {};
  document.getElementById("title").textContent = `${api.info.title} ${api.info.version}`;
  document.getElementById("about").textContent = api.info.description;
  const operations = document.getElementById("operations");
  const used = new Set();
  for (const [path, methods] of Object.entries(api.paths)) {
    for (const [method, about] of Object.entries(methods)) {
      operations.append(operation(path, method, about));
      const body = about.requestBody?.content["application/json"]?.schema;
      if (body?.$ref) used.add(body.$ref.split("/").pop());
    }
  }
  for (const [name, schema] of Object.entries(schemas)) {
    if (!used.has(name) && schema.properties) {
      operations.append(element("section", "", element("h3", name), table(schema)));
    }
  }
}

render().catch((error) => {
  document.getElementById("about").textContent = `openapi.json cannot be shown: ${error}`;
});
