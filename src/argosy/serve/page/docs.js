// A reader of /openapi.json: routes, their fields and types, an example, and a curl line to copy.
// A route is drawn when it is opened, because the document has hundreds of types.

const DEEPEST = 4; // of objects inside objects in an example

const byId = (id) => document.getElementById(id);

function made(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

class Document {
  constructor(content) {
    this.content = content;
  }

  /** The operations in order: {method, path, operation}. */
  operations() {
    return Object.entries(this.content.paths).flatMap(([path, methods]) =>
      Object.entries(methods).map(([method, operation]) => ({ method: method.toUpperCase(), path, operation })));
  }

  /** The schema that a reference stands for. */
  resolved(schema) {
    let found = schema ?? {};
    while (found.$ref) found = this.content.components.schemas[found.$ref.split("/").pop()] ?? {};
    return found;
  }

  /** The ways in which a value may be given, without null. */
  branches(schema) {
    const found = this.resolved(schema);
    const inner = found.anyOf ?? found.oneOf;
    if (inner === undefined) return [schema ?? {}];
    return inner.flatMap((one) => this.branches(one)).filter((one) => one.type !== "null");
  }

  /** A type in words. */
  typeOf(schema) {
    return [...new Set(this.branches(schema).map((one) => this.plainType(one)))].join(" or ") || "anything";
  }

  plainType(schema) {
    const found = this.resolved(schema);
    if ("const" in found) return JSON.stringify(found.const);
    if (found.enum) return found.enum.map((one) => JSON.stringify(one)).join(" or ");
    if (found.type === "array") return `list of ${found.items ? this.typeOf(found.items) : "anything"}`;
    if (schema.$ref) return schema.$ref.split("/").pop();
    return found.type ?? "anything";
  }

  /** The bounds of a value in words. */
  boundsOf(schema) {
    const said = this.branches(schema).flatMap((one) => {
      const { minimum, exclusiveMinimum, maximum, exclusiveMaximum, minLength, maxLength, minItems, maxItems, pattern } =
        this.resolved(one);
      return [
        minimum !== undefined && `at least ${minimum}`,
        exclusiveMinimum !== undefined && `above ${exclusiveMinimum}`,
        maximum !== undefined && `at most ${maximum}`,
        exclusiveMaximum !== undefined && `below ${exclusiveMaximum}`,
        minLength !== undefined && `at least ${minLength} characters`,
        maxLength !== undefined && `at most ${maxLength} characters`,
        minItems !== undefined && `at least ${minItems} items`,
        maxItems !== undefined && `at most ${maxItems} items`,
        pattern !== undefined && `matches ${pattern}`,
      ].filter(Boolean);
    });
    return [...new Set(said)].join(", ");
  }

  /** The fields of an object; of several kinds of object, all of them. */
  fieldsOf(schema) {
    const fields = new Map();
    for (const branch of this.branches(schema)) {
      const found = this.resolved(branch);
      for (const [name, field] of Object.entries(found.properties ?? {})) {
        if (!fields.has(name)) fields.set(name, { field, isRequired: (found.required ?? []).includes(name) });
      }
    }
    return fields;
  }

  /** The schema of the objects in a value: its own, or that of its items. */
  objectsIn(schema) {
    return this.branches(schema).flatMap((one) => {
      const found = this.resolved(one);
      if (found.type === "array" && found.items) return this.objectsIn(found.items);
      return found.properties ? [one] : [];
    });
  }

  /** A small value that a route accepts. */
  exampleOf(schema, depth = 0) {
    const own = this.resolved(schema);
    if (own.examples) return own.examples[0];
    const [first] = this.branches(schema);
    const found = this.resolved(first);
    if (found.examples) return found.examples[0];
    if ("const" in found) return found.const;
    if (found.enum) return found.enum[0];
    if (found.type === "array") {
      return found.minItems && depth < DEEPEST ? [this.exampleOf(found.items, depth + 1)] : [];
    }
    if (found.type === "object") {
      const needed = found.required ?? [];
      const shown = Object.entries(found.properties ?? {}).filter(([name, field]) => needed.includes(name) || field.examples);
      return Object.fromEntries(
        depth < DEEPEST ? shown.map(([name, field]) => [name, this.exampleOf(field, depth + 1)]) : [],
      );
    }
    return { string: "text", integer: found.minimum ?? 1, number: 1, boolean: true }[found.type] ?? null;
  }
}

// Whether this server answers without a key: then no line needs one.
let hasKeys = true;

function curlLine({ method, path, operation }, content) {
  const words = ["curl", `${location.origin}${path}`];
  if (operation.security && hasKeys) words.push('-H "Authorization: Bearer $ARGOSY_API_KEY"');
  const [type, body] = Object.entries(operation.requestBody?.content ?? {})[0] ?? [];
  if (type === "application/json") {
    const text = JSON.stringify(content.exampleOf(body.schema)).replaceAll("'", "'\\''");
    words.push("-H 'content-type: application/json'", `-d '${text}'`);
  } else if (type !== undefined) {
    words.push("-F file=@talk.mp3", "-F model=whisper-1");
  } else if (method !== "GET") {
    words.push(`-X ${method}`);
  }
  return words.join(" ");
}

function drawFields(schema, content, caption) {
  const rows = [...content.fieldsOf(schema)].map(([name, { field, isRequired }]) => {
    const told = made("td", {}, made("code", { textContent: content.typeOf(field) }));
    const more = [field.description ?? content.resolved(field).description, content.boundsOf(field)].filter(Boolean);
    if (more.length) told.append(made("div", { className: "soft", textContent: more.join(" ") }));
    const inner = content.objectsIn(field);
    if (inner.length) told.append(drawInner(inner, content, name));
    return made("tr", {},
      made("td", {}, made("code", { textContent: name }), isRequired ? " (required)" : ""), told);
  });
  if (!rows.length) return made("p", {}, made("code", { textContent: content.typeOf(schema) }));
  const titles = ["Field", "Type"].map((title) => made("th", { scope: "col", textContent: title }));
  const table = made("table", {},
    made("caption", { textContent: caption }), made("thead", {}, made("tr", {}, ...titles)), made("tbody", {}, ...rows));
  return made("div", { className: "scroll" }, table);
}

/** The fields of objects inside a field; they are drawn when they are opened, since types may contain themselves. */
function drawInner(schemas, content, name) {
  const details = made("details", {}, made("summary", { textContent: `fields of ${name}` }));
  details.addEventListener("toggle", () => {
    if (details.childElementCount === 1) {
      details.append(...schemas.map((one) => drawFields(one, content, content.plainType(one))));
    }
  });
  return details;
}

function drawRoute(entry, content) {
  const { operation } = entry;
  const parts = [];
  const line = curlLine(entry, content);
  const shown = made("code", { textContent: line });
  const copy = made("button", { type: "button", textContent: "Copy" });
  copy.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(line);
      byId("status").textContent = `Copied the curl line of ${entry.path}`;
    } catch { // browsers have no clipboard for pages without TLS, except those of this machine
      getSelection().selectAllChildren(shown);
      byId("status").textContent = `Selected the curl line of ${entry.path}`;
    }
  });
  const key = operation.security && hasKeys ? "Needs a key." : "Needs no key.";
  parts.push(made("p", { className: "soft", textContent: key }));
  parts.push(made("h4", { textContent: "Try it" }), made("pre", {}, shown), copy);
  for (const [type, body] of Object.entries(operation.requestBody?.content ?? {})) {
    parts.push(made("h4", { textContent: "Request" }), drawFields(body.schema, content, type));
  }
  parts.push(made("h4", { textContent: "Answer" }));
  for (const [type, answer] of Object.entries(operation.responses["200"].content ?? {})) {
    const item = answer.itemSchema?.properties?.data;
    const streamed = item?.contentSchema ?? item?.anyOf?.find((one) => one.contentSchema)?.contentSchema;
    const schema = streamed ?? answer.itemSchema ?? answer.schema;
    parts.push(drawFields(schema, content, answer.itemSchema ? `${type}, for each part of the stream` : type));
  }
  const refusals = Object.entries(operation.responses).filter(([status]) => status !== "200");
  const rows = refusals.map(([status, { description }]) =>
    made("tr", {}, made("td", {}, made("code", { textContent: status })), made("td", { textContent: description })));
  parts.push(made("h4", { textContent: "Refusals" }), made("table", {}, made("tbody", {}, ...rows)));
  return made("div", {}, ...parts);
}

function drawEntry(entry, content) {
  const title = made("h3", {},
    made("code", { className: "method", textContent: entry.method }), " ", made("code", { textContent: entry.path }),
    made("span", { className: "soft", textContent: ` ${entry.operation.summary.split("\n")[0]}` }));
  const details = made("details", { className: "route" }, made("summary", {}, title));
  details.addEventListener("toggle", () => {
    if (details.childElementCount === 1) details.append(drawRoute(entry, content));
  });
  return details;
}

// The groups of routes, in the order in which they are shown; a route belongs to the first one that matches.
const GROUPS = [
  ["Chat and text", /^\/v1\/(?:chat|completions|responses|messages|models|moderations)/],
  ["Embeddings and ranking", /^\/(?:v1\/)?(?:embed|rerank)/],
  ["Audio", /^\/v1\/audio/],
  ["Ollama", /^\/api\//],
  ["llama.cpp and tokens", /^\/(?:infill|props|slots|tokenize|tokenizer_info|detokenize|apply-template)/],
  ["Engine and health", /^\/(?:v1\/engine\/(?:state|events|transparency)|health|ready|metrics|v1\/cluster$)/],
  ["Administration", /^\/v1\/(?:engine|cluster)/],
  ["This page", /^/],
];

async function start() {
  const [answer, models] = await Promise.all([fetch("openapi.json"), fetch("v1/models").catch(() => null)]);
  hasKeys = models?.ok !== true;
  if (!answer.ok) throw new Error(`the server answered with status ${answer.status}`);
  const content = new Document(await answer.json());
  byId("version").textContent = content.content.info.version;
  const entries = content.operations().map((entry) => {
    const words = `${entry.method} ${entry.path} ${entry.operation.summary}`.toLowerCase();
    const group = GROUPS.findIndex(([, pattern]) => pattern.test(entry.path));
    return { words, group, element: drawEntry(entry, content) };
  });
  const groups = GROUPS.map(([title], place) => {
    const own = entries.filter(({ group }) => group === place);
    const element = made("section", {}, made("h2", { className: "group", textContent: title }), ...own.map((entry) => entry.element));
    return { own, element };
  });
  byId("routes").replaceChildren(...groups.map(({ element }) => element));
  const show = () => {
    const wanted = byId("filter").value.trim().toLowerCase();
    for (const { words, element } of entries) element.hidden = !words.includes(wanted);
    for (const { own, element } of groups) element.hidden = own.every((entry) => entry.element.hidden);
    const count = entries.filter(({ element }) => !element.hidden).length;
    byId("status").textContent = `${count} of ${entries.length} routes`;
  };
  byId("filter").addEventListener("input", show);
  show();
}

start().catch((error) => {
  byId("status").textContent = `The routes cannot be shown: ${error.message}`;
});
