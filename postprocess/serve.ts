/**
 * The page with a text box: graphs, questions and circuits of new texts, computed on this machine.
 *
 *   npx tsx nano-param-decomp.ts serve --run DIR [--port 8321]
 *
 * Listens on 127.0.0.1 only. A request is refused when its Host is another name (DNS rebinding), when its Origin or
 * Sec-Fetch-Site says that another site sent it, when it isn't JSON, or when it is too large. One job at a time, in this
 * process; it goes on when the tab is closed, and a reloaded page finds it again. What is sent comes back as JSON alone:
 * the page puts texts into text nodes.
 *
 *   GET  /            the page                   POST /api/job     {"kind": "graph" | "ask" | "circuit", "text", …}
 *   GET  /api/job     the last job               POST /api/cancel  {"id"}
 */

import * as fs from 'node:fs';
import * as http from 'node:http';
import type { AddressInfo } from 'node:net';
import * as path from 'node:path';
import { answer, parseEdits } from './ask.ts';
import { findCircuit } from './circuit.ts';
import { circuitDefaults } from './formats.ts';
import { promptGraph } from './graph.ts';
import { packGraph, pageData, pageParts, renderPage } from './parts.ts';
import type { LmRun } from './run.ts';
import { encode, type Flags, numberFlag, refuse, talk, tokenId } from './stages.ts';

export const serveDefaults = {
  bodyBytes: 65_536, // of a request
  textLength: 10_000, // characters of a text
  fieldLength: 2000, // and of the other fields
  tokens: 256, // of a text
  continuation: 24, // tokens of an answer
  circuitSteps: 300,
};
export type ServeSettings = typeof serveDefaults;

const KINDS = ['graph', 'ask', 'circuit'] as const;
interface Request {
  kind: (typeof KINDS)[number];
  text: string;
  without: string;
  token: string;
}
/** What GET /api/job says. */
interface Work {
  id: number;
  kind: Request['kind'];
  request: Request;
  state: 'running' | 'done' | 'failed' | 'cancelled';
  done: number;
  total: number; // 0: not known
  result?: unknown;
  error?: string;
}
/** A refusal with its HTTP status. */
class HttpError extends Error {
  readonly status: number;
  constructor(status: number, message: string) {
    super(message);
    this.status = status;
  }
}
class Cancelled extends Error {}

/** The fields of a job's body, each of which must be a text within its bound. */
function readRequest(body: unknown, settings: ServeSettings): Request {
  if (typeof body !== 'object' || body === null || Array.isArray(body)) throw new HttpError(400, 'takes a JSON object');
  const { kind, ...fields } = body as Record<string, unknown>;
  if (!KINDS.includes(kind as Request['kind'])) throw new HttpError(400, `kind: takes one of ${KINDS.join(', ')}`);
  const field = (name: string, most: number): string => {
    const value = fields[name] ?? '';
    if (typeof value !== 'string' || value.length > most)
      throw new HttpError(400, `${name}: takes a text of at most ${most} characters`);
    return value;
  };
  const text = field('text', settings.textLength);
  if (!text.trim()) throw new HttpError(400, 'text: is empty');
  const [without, token] = [field('without', settings.fieldLength), field('token', settings.fieldLength)];
  return { kind: kind as Request['kind'], text, without, token };
}

/** Does a job; `tick` is called now and then, and throws when it is to end. */
async function work(
  job: LmRun,
  request: Request,
  settings: ServeSettings,
  tick: (done: number, total: number) => Promise<void>,
) {
  const { modules, config } = job.problem;
  const tokens = encode(job, request.text);
  if (tokens.length > settings.tokens)
    return refuse(`the text has ${tokens.length} tokens; takes at most ${settings.tokens}`);
  if (request.kind === 'graph') {
    const made = await promptGraph(job, tokens, {}, [], tick);
    return packGraph(modules, { ...made, text: request.text });
  }
  if (request.kind === 'ask') {
    const edits = parseEdits(modules, request.without, '');
    let done = 0;
    const question = { tokens, edits, onlyWhereActive: false, length: settings.continuation, temperature: 0, seed: 0 };
    return answer(job, question, () => tick(++done, 0));
  }
  const token = request.token.trim() ? tokenId(job, request.token) : undefined;
  const position = tokens.length - 1;
  const circuit = { ...circuitDefaults, steps: settings.circuitSteps, seed: config.seed };
  return findCircuit(job, { text: request.text, tokens, position, token }, circuit, step => tick(step, circuit.steps));
}

/** Reads a JSON body of bounded size. */
async function readBody(request: http.IncomingMessage, most: number): Promise<unknown> {
  const parts: Buffer[] = [];
  let size = 0;
  for await (const part of request as AsyncIterable<Buffer>) {
    size += part.length;
    if (size > most) throw new HttpError(413, `a request has at most ${most} bytes`);
    parts.push(part);
  }
  try {
    return JSON.parse(Buffer.concat(parts).toString('utf8'));
  } catch {
    throw new HttpError(400, 'takes JSON');
  }
}

/** Refuses what another site, or a page behind another name, has sent. */
function checkSender({ headers, method }: http.IncomingMessage, port: number): void {
  const hosts = [`127.0.0.1:${port}`, `localhost:${port}`];
  if (!hosts.includes(headers.host ?? '')) throw new HttpError(403, 'wrong Host');
  const { origin } = headers;
  if (origin !== undefined && !hosts.some(host => origin === `http://${host}`))
    throw new HttpError(403, 'wrong Origin');
  const site = headers['sec-fetch-site'];
  const opened = method === 'GET' && site === 'none'; // by hand: an address typed, a bookmark
  if (site !== undefined && site !== 'same-origin' && !opened) throw new HttpError(403, 'a cross-site request');
  if (method === 'POST' && !/^application\/json\s*(;|$)/i.test(headers['content-type'] ?? ''))
    throw new HttpError(415, 'takes application/json');
}

/** The page of the run as it is now, which may ask this server and nobody else. */
function livePage(job: LmRun): string {
  const { config, modules } = job.problem;
  const file = path.join(config.out, 'report.html');
  const data = fs.existsSync(file) ? pageData(fs.readFileSync(file, 'utf8')) : undefined;
  if (!data) return refuse(`${config.out}: no report.html; harvest --run ${config.out} makes it`);
  const page = renderPage({ ...data, ...pageParts(config.out, modules), live: true });
  return page.replace("default-src 'none';", "default-src 'none'; connect-src 'self';");
}

/** Starts the server; port 0: any. @returns it, listening */
export async function startServer(job: LmRun, port: number, given: Partial<ServeSettings> = {}): Promise<http.Server> {
  const settings = { ...serveDefaults, ...given };
  livePage(job); // refuses a run without a page before anything listens
  let last: Work | undefined;
  let cancelled: number | undefined;

  const begin = (request: Request): Work => {
    const started: Work = { id: (last?.id ?? 0) + 1, kind: request.kind, request, state: 'running', done: 0, total: 0 };
    last = started;
    const tick = async (done: number, total: number) => {
      Object.assign(started, { done, total });
      await new Promise(setImmediate); // requests come in here
      if (cancelled === started.id) throw new Cancelled();
    };
    work(job, request, settings, tick).then(
      result => Object.assign(started, { state: 'done', result }),
      (error: Error) => {
        const known = error.name === 'UsageError';
        if (error instanceof Cancelled) started.state = 'cancelled';
        else Object.assign(started, { state: 'failed', error: known ? error.message : 'failed: see the terminal' });
        if (!known && !(error instanceof Cancelled)) talk(`${error.stack}`);
      },
    );
    return started;
  };

  const route = async (request: http.IncomingMessage): Promise<[type: string, body: string, status?: number]> => {
    checkSender(request, (server.address() as AddressInfo).port);
    const json = (value: unknown, status = 200): [string, string, number] => [
      'application/json',
      JSON.stringify(value),
      status,
    ];
    switch (`${request.method} ${request.url}`) {
      case 'GET /':
        return ['text/html', livePage(job)];
      case 'GET /api/job':
        return json(last ?? { id: 0, state: 'none' });
      case 'POST /api/job': {
        const asked = readRequest(await readBody(request, settings.bodyBytes), settings);
        if (last?.state === 'running') throw new HttpError(409, 'a job is running; cancel it, or wait');
        return json({ id: begin(asked).id }, 202);
      }
      case 'POST /api/cancel': {
        const { id } = ((await readBody(request, settings.bodyBytes)) ?? {}) as { id?: unknown };
        if (last?.state !== 'running' || id !== last.id) throw new HttpError(409, 'no such job is running');
        cancelled = last.id;
        return json({ id });
      }
      default:
        throw new HttpError(404, 'there is nothing here');
    }
  };

  const server = http.createServer({ requestTimeout: 10_000, headersTimeout: 5000 }, (request, response) => {
    response.on('error', () => {}); // a closed tab
    const send = (status: number, type: string, body: string) => {
      response.writeHead(status, {
        'Content-Type': `${type}; charset=utf-8`,
        'Cache-Control': 'no-store',
        'X-Content-Type-Options': 'nosniff',
        'X-Frame-Options': 'DENY',
        'Referrer-Policy': 'no-referrer',
        'Cross-Origin-Resource-Policy': 'same-origin',
        ...(status >= 400 && { Connection: 'close' }), // the rest of a refused body is not read
      });
      response.end(body);
    };
    route(request).then(
      ([type, body, status]) => send(status ?? 200, type, body),
      (error: Error) => {
        const status = error instanceof HttpError ? error.status : error.name === 'UsageError' ? 400 : 500;
        if (status === 500) talk(`${error.stack}`);
        send(status, 'application/json', JSON.stringify({ error: status === 500 ? 'failed' : error.message }));
      },
    );
  });
  server.maxConnections = 64;
  await new Promise<void>((resolve, reject) => {
    server.once('error', reject);
    server.listen(port, '127.0.0.1', resolve);
  });
  return server;
}

export const FLAGS = { port: 'string' } as const;

/** The command: serves until it is interrupted. @returns the exit code */
export async function serve(job: LmRun, flags: Flags): Promise<number> {
  const port = numberFlag(flags, 'port', 8321, { min: 0, max: 65_535, integer: true });
  const server = await startServer(job, port).catch((error: NodeJS.ErrnoException) =>
    error.code === 'EADDRINUSE' ? refuse(`--port ${port}: is in use`) : Promise.reject(error),
  );
  console.log(`http://127.0.0.1:${(server.address() as AddressInfo).port}/`);
  return new Promise<number>(resolve => {
    for (const [signal, code] of [['SIGINT', 130], ['SIGTERM', 143]] as const) // biome-ignore format: a table
      process.once(signal, () => {
        server.close();
        server.closeAllConnections();
        resolve(code);
      });
  });
}
