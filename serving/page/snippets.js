// The request as code that can be copied and run where the image lies.

const quoted = (word) => `'${word.replaceAll("'", "'\\''")}'`;

/** Text inside a here-document whose variables are filled in. */
const escaped = (text) => text.replace(/[\\$`]/g, "\\$&");

/** `image` is left out of `body`: the code reads it from a file. */
export function curlOf(body, { url, file, hasKey }) {
  const lines = [];
  if (file) lines.push(`IMAGE=$(base64 -w0 ${quoted(file)})`);
  const key = hasKey ? ' -H "authorization: Bearer $SIEVE_API_KEY"' : "";
  lines.push(`curl -s ${quoted(`${url}/v1/label`)} -H 'content-type: application/json'${key} -d @- <<JSON`);
  const fields = Object.entries(body).map(
    ([name, value]) => `  ${JSON.stringify(name)}: ${escaped(JSON.stringify(value))}`,
  );
  if (file) fields.unshift('  "image": "data:image/jpeg;base64,$IMAGE"');
  lines.push("{", fields.join(",\n"), "}", "JSON");
  return lines.join("\n");
}

/** A value as Python writes it; JSON's strings and numbers are Python's. */
const python = (value) =>
  value === true ? "True" : value === false ? "False" : JSON.stringify(value);

export function pythonOf(body, { url, file, hasKey }) {
  const lines = ["import base64", ...(hasKey ? ["import os"] : []), "", "import httpx", ""];
  if (!file) lines.shift();
  const fields = Object.entries(body).map(([name, value]) => `    ${JSON.stringify(name)}: ${python(value)},`);
  if (file) {
    lines.push(`with open(${JSON.stringify(file)}, "rb") as file:`);
    lines.push("    image = base64.b64encode(file.read()).decode()");
    fields.unshift('    "image": f"data:image/jpeg;base64,{image}",');
  }
  lines.push("body = {", ...fields, "}");
  const headers = hasKey ? ', headers={"authorization": f"Bearer {os.environ[\'SIEVE_API_KEY\']}"}' : "";
  lines.push(`answer = httpx.post(${JSON.stringify(`${url}/v1/label`)}, json=body${headers}, timeout=120)`);
  lines.push("print(answer.json())");
  return lines.join("\n").trimStart();
}
