// Starts the real binary on free ports and ends it again.

import { spawn } from "node:child_process";
import { accessSync, constants } from "node:fs";
import path from "node:path";
import { createInterface } from "node:readline";
import { fileURLToPath } from "node:url";

const HERE = path.dirname(fileURLToPath(import.meta.url));
const START_MS_MAX = 30_000;
const SECOND_SIGNAL_MS = 500;

// `TOLLGATE_BIN`, else the debug build.
function binary() {
  const target = process.env.CARGO_TARGET_DIR ?? path.join(HERE, "../../target");
  const file = process.env.TOLLGATE_BIN ?? path.join(target, "debug", "tollgate");
  try {
    accessSync(file, constants.X_OK);
  } catch {
    throw new Error(`${file} is not there: build it with \`cargo build -p tollgate\`, or set TOLLGATE_BIN`);
  }
  return file;
}

// One process of the gateway: `data` and `admin` are the addresses it listens on.
export async function start() {
  // Of the environment only what a process needs: a stray API_KEYS would change the configuration.
  const kept = ["PATH", "HOME", "TMPDIR"].filter((name) => process.env[name] !== undefined);
  const env = Object.fromEntries(kept.map((name) => [name, process.env[name]]));
  const file = path.join(HERE, "tollgate.yml");
  const child = spawn(binary(), ["serve", "-c", file], { stdio: ["ignore", "ignore", "pipe"], env });
  process.on("exit", () => child.kill("SIGKILL"));
  const ended = new Promise((resolve) => child.once("close", resolve));
  const addresses = await listening(child);
  return { ...addresses, answered: (code) => answered(addresses.admin, code), stop: () => stop(child, ended) };
}

function listening(child) {
  return new Promise((resolve, reject) => {
    const lines = [];
    const addresses = {};
    const fail = (why) => reject(new Error(`the gateway did not start: ${why}\n${lines.join("\n")}`));
    const timer = setTimeout(() => fail("it says nothing"), START_MS_MAX);
    child.once("error", (error) => fail(error.message));
    child.once("close", (code) => fail(`it ended with ${code}`));
    // Read to the end, so that its log never waits for us.
    createInterface({ input: child.stderr }).on("line", (line) => {
      if (addresses.done) return;
      lines.push(line);
      if (!line.includes('"listening"')) return;
      const { plane, address } = JSON.parse(line);
      // Two listeners, or one that is "data and admin".
      for (const name of plane.split(" and ")) addresses[name] = address;
      if (addresses.data && addresses.admin) {
        addresses.done = true;
        clearTimeout(timer);
        resolve({ data: addresses.data, admin: addresses.admin });
      }
    });
  });
}

async function stop(child, ended) {
  child.kill("SIGTERM");
  // A second signal ends it without the seconds in which a load balancer would notice the first.
  const second = setTimeout(() => child.kill("SIGTERM"), SECOND_SIGNAL_MS);
  await ended;
  clearTimeout(second);
}

// How many chat completions ended with this status: `tollgate_http_requests_total`.
async function answered(admin, code) {
  const text = await (await fetch(`http://${admin}/metrics`)).text();
  const wanted = ['endpoint="/v1/chat/completions"', `code="${code}"`];
  let sum = 0;
  for (const [, labels, value] of text.matchAll(/^tollgate_http_requests_total\{([^}]*)\} (\d+)/gm)) {
    const all = labels.split(",");
    if (wanted.every((label) => all.includes(label))) sum += Number(value);
  }
  return sum;
}
