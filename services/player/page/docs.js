// The API as /openapi.json describes it, readable and without anything from other sites.

const answer = await fetch("openapi.json");
const spec = await answer.json();
const $ = (id) => document.getElementById(id);

const resolve = (schema) => (schema?.$ref ? spec.components.schemas[schema.$ref.split("/").at(-1)] : schema);

function make(kind, ...inside) {
  const element = document.createElement(kind);
  element.append(...inside);
  return element;
}

// A type in a few words.
function typeOf(schema) {
  if (schema.$ref) return schema.$ref.split("/").at(-1);
  const several = schema.anyOf ?? schema.oneOf;
  if (several) return several.map(typeOf).join(" | ");
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.enum) return schema.enum.map((one) => JSON.stringify(one)).join(" | ");
  if (schema.type === "array") return `[${typeOf(schema.items ?? {})}]`;
  return schema.type ?? "any";
}

function fields(schema) {
  const whole = resolve(schema);
  const required = new Set(whole.required ?? []);
  const rows = Object.entries(whole.properties ?? {}).map(([name, field]) => {
    const fallback = field.default !== undefined && field.default !== null ? ` (default ${JSON.stringify(field.default)})` : "";
    const note = `${field.description ?? ""}${fallback}${required.has(name) || fallback ? "" : " Optional."}`;
    return make("tr", make("td", make("code", name)), make("td", typeOf(field)), make("td", note));
  });
  // What a union is made of is shown right below.
  const parts = Object.values(whole.properties ?? {})
    .flatMap((field) => field.oneOf ?? field.anyOf ?? [])
    .filter((part) => part.$ref)
    .map((part) => make("div", make("h3", typeOf(part), `: ${resolve(part).description ?? ""}`), fields(part)));
  return make("div", make("table", ...rows), ...parts);
}

// By hand, since a PNG file in base64 says nothing.
function example(schema, depth = 0) {
  const whole = resolve(schema);
  if (whole.default !== undefined) return whole.default;
  if (whole.const !== undefined) return whole.const;
  if (whole.enum) return whole.enum[0];
  const several = whole.anyOf ?? whole.oneOf;
  if (several) return example(several[0], depth);
  if (whole.type === "array") return depth > 6 ? [] : [example(whole.items ?? {}, depth + 1)];
  if (whole.type === "object") {
    const shown = Object.entries(whole.properties ?? {}).filter(([name]) => (whole.required ?? []).includes(name));
    return Object.fromEntries(shown.map(([name, field]) => [name, example(field, depth + 1)]));
  }
  return { string: "iVBORw0…", number: 0.5, integer: 0, boolean: true }[whole.type] ?? null;
}

function operation(path, verb, one) {
  const article = make("article", make("h2", make("span", verb.toUpperCase()), make("code", path)));
  article.querySelector("span").className = "verb";
  article.append(make("p", one.description ?? ""));
  const sent = one.requestBody?.content["application/json"]?.schema;
  if (one.parameters?.length) {
    article.append(make("h3", "In the address"));
    article.append(make("table", ...one.parameters.map((parameter) => make("tr",
      make("td", make("code", parameter.name)), make("td", typeOf(parameter.schema)), make("td", parameter.description ?? "")))));
  }
  if (sent) {
    article.append(make("h3", "Send"), fields(sent), make("h3", "For example"), make("pre", JSON.stringify(example(sent))));
  }
  const [status, good] = Object.entries(one.responses).find(([code]) => code < 300);
  article.append(make("h3", `Answer (${status})`));
  const got = good.content?.["application/json"]?.schema;
  article.append(got && (resolve(got).properties ? fields(got) : make("p", typeOf(got))) || make("p", Object.keys(good.content ?? {}).join(", ") || "nothing"));
  const bad = Object.entries(one.responses).filter(([code]) => code >= 400).map(([code, { description }]) => `${code}: ${description}`);
  if (bad.length) article.append(make("h3", "Refusals, as {\"error\", \"fix\"}"), make("p", bad.join(" ")));
  return article;
}

$("about").textContent = spec.info.description;
for (const [path, verbs] of Object.entries(spec.paths)) {
  for (const [verb, one] of Object.entries(verbs)) $("operations").append(operation(path, verb, one));
}
