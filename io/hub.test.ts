// Downloads from a Hub of our own on this machine: its redirects, its refusals and everything that can go wrong.

import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { createHash } from 'node:crypto';
import fs from 'node:fs';
import http from 'node:http';
import type { AddressInfo } from 'node:net';
import os from 'node:os';
import path from 'node:path';
import { after, before, beforeEach, test } from 'node:test';
import { datasetCommit, datasetShards, resolveModel as resolveWithCommit } from '../io/hub.ts';
import { proxyFor } from '../io/proxy.ts';
import { UsageError } from '../io/usage-error.ts';

const MODULE = new URL('../io/hub.ts', import.meta.url).href;
const TOKEN = 'hf_secret';
const COMMIT = 'c0ffee'.padEnd(40, '0');
const gitId = (b: Buffer) => createHash('sha1').update(`blob ${b.length}\0`).update(b).digest('hex');
const sha256 = (b: Buffer) => createHash('sha256').update(b).digest('hex');

// ---- A Hub ----------------------------------------------------------------------------------------------------------

type Handler = (request: http.IncomingMessage, response: http.ServerResponse, name: string) => void;

/** What the servers do; every test starts with a well-behaved Hub of one model. */
let repo: { id: string; files: Record<string, Buffer>; lfs: RegExp; listed?: string[] };
let head: string; // the commit at which the branch stands
let api: Handler | undefined; // instead of the list of files
let resolve: Handler | undefined; // instead of a file at the Hub
let storage: Handler; // a file at the other host
let log: { host: 'hub' | 'storage'; method: string; url: string; token?: string; range?: string; ifRange?: string }[];

const hub = http.createServer((request, response) => {
  record('hub', request);
  const url = decodeURIComponent(request.url ?? '');
  if (url.startsWith('/api/')) {
    if (api) return api(request, response, '');
    if (!url.startsWith(`/api/${repo.id}/revision/`)) return void response.writeHead(404).end();
    const siblings = (repo.listed ?? Object.keys(repo.files)).map(rfilename => ({ rfilename }));
    return void response.end(JSON.stringify({ sha: head, siblings }));
  }
  const [, name = ''] = new RegExp(`/resolve/${head}/(.*)`).exec(url) ?? [];
  const content = repo.files[name];
  if (resolve) return resolve(request, response, name);
  if (!content) return void response.writeHead(404, { 'x-error-message': 'Entry not found' }).end();
  if (repo.lfs.test(name)) return redirect(response, name, content);
  // as on the Hub: small files come after a relative redirect, with a weak git etag
  if (!url.startsWith('/cached')) return void response.writeHead(307, { location: `/cached${request.url}` }).end();
  response.writeHead(200, { etag: `W/"${gitId(content)}"`, 'content-length': content.length });
  response.end(request.method === 'HEAD' ? undefined : content);
});
const store = http.createServer((request, response) => {
  record('storage', request);
  storage(request, response, decodeURIComponent(request.url!.slice(1)));
});

function record(host: 'hub' | 'storage', { method = '', url = '', headers }: http.IncomingMessage) {
  const { authorization: token, range, 'if-range': ifRange } = headers as Record<string, string>;
  log.push({ host, method, url, ...(token && { token }), ...(range && { range }), ...(ifRange && { ifRange }) });
}
function redirect(response: http.ServerResponse, name: string, content: Buffer, size = content.length) {
  const location = `http://localhost:${port(store)}/${encodeURIComponent(name)}`;
  const headers = { location, 'x-linked-etag': `"${sha256(content)}"`, 'x-linked-size': size, etag: '"of-redirect"' };
  response.writeHead(302, headers).end('Found. Redirecting.');
}
const port = (server: http.Server) => (server.address() as AddressInfo).port;

/** Sends `content` as asked by the range, or (`upTo`) cuts the connection there. */
function send(request: http.IncomingMessage, response: http.ServerResponse, content: Buffer, upTo?: number) {
  const from = Number(/bytes=(\d+)-/.exec(request.headers.range ?? '')?.[1] ?? 0);
  if (from >= content.length) return void response.writeHead(416).end();
  const headers = { etag: '"stored"', 'content-length': content.length - from };
  if (from > 0) {
    const range = `bytes ${from}-${content.length - 1}/${content.length}`;
    response.writeHead(206, { ...headers, 'content-range': range });
  } else response.writeHead(200, headers);
  if (upTo === undefined || upTo >= content.length) return void response.end(content.subarray(from));
  // the pause lets what is sent arrive before the connection breaks
  response.write(content.subarray(from, Math.max(from, upTo)), () => {
    setTimeout(() => response.destroy(), 30);
  });
}

// ---- The tests' own world -------------------------------------------------------------------------------------------

const root = fs.mkdtempSync(path.join(os.tmpdir(), 'hub-'));
const environment = { ...process.env };
let cache: string;
let runs = 0;

before(async () => {
  await new Promise<void>(done => hub.listen(0, '127.0.0.1', done));
  await new Promise<void>(done => store.listen(0, 'localhost', done));
});
after(() => {
  hub.closeAllConnections();
  hub.close();
  store.closeAllConnections();
  store.close();
  fs.rmSync(root, { recursive: true });
});
beforeEach(() => {
  const weights = Buffer.from(Array.from({ length: 300_000 }, (_, i) => (i * i) % 251));
  const files = {
    'config.json': Buffer.from('{"model_type":"llama"}'),
    'tokenizer.json': Buffer.from('{"model":{}}'),
    'model.safetensors': weights,
    'pytorch_model.bin': Buffer.from('pickle'),
    'README.md': Buffer.from('# A model'),
  };
  repo = { id: 'models/org/name', files, lfs: /\.safetensors|\.bin|\.parquet/ };
  [api, resolve, head] = [undefined, undefined, COMMIT];
  storage = (request, response, name) => send(request, response, repo.files[name]!);
  log = [];
  cache = path.join(root, `cache-${runs++}`);
  for (const name of Object.keys(process.env))
    if (/^HF_|^XDG_CACHE|^HUGGING|^TRANSFORMERS_|_proxy$/i.test(name)) delete process.env[name];
  Object.assign(process.env, {
    HOME: path.join(root, 'home'),
    HF_HUB_CACHE: cache,
    HF_ENDPOINT: `http://127.0.0.1:${port(hub)}/`,
    HF_TOKEN: TOKEN,
    HF_HUB_DOWNLOAD_TIMEOUT: '0.4',
  });
});
after(() => Object.assign(process.env, environment));

const folder = () => path.join(cache, 'models--org--name');
const everything = (dir: string) =>
  fs.existsSync(dir) ? (fs.readdirSync(dir, { recursive: true }) as string[]).sort() : [];
const partial = () => everything(cache).filter(name => name.includes('.incomplete'));
const gets = (name: string) => log.filter(r => r.method === 'GET' && r.host === 'storage' && r.url === `/${name}`);

/** The folder alone. */
const resolveModel = async (spec: string) => (await resolveWithCommit(spec)).dir;

/** The promise must fail in one clear line, without the token, and leave nothing that looks whole. */
async function refused(promise: Promise<unknown>, message: RegExp): Promise<void> {
  await assert.rejects(promise, (error: Error) => {
    assert.ok(error instanceof UsageError, error.stack);
    assert.match(error.message, message);
    assert.doesNotMatch(error.message, /\n|hf_secret/);
    return true;
  });
  assert.ok(!fs.existsSync(path.join(folder(), 'refs/main')), 'a ref was written');
}

/** The model is there, byte for byte. */
function assertWhole(snapshot: string, names = ['config.json', 'tokenizer.json', 'model.safetensors']): void {
  assert.equal(snapshot, path.join(folder(), 'snapshots', COMMIT));
  for (const name of names) assert.ok(fs.readFileSync(path.join(snapshot, name)).equals(repo.files[name]!), name);
  assert.deepEqual(partial(), []);
}

/** resolveModel in a process of its own. */
function inProcess(spec = 'org/name') {
  const code = `import(${JSON.stringify(MODULE)}).then(m => m.resolveModel(${JSON.stringify(spec)})).then(m => console.log(m.dir))`;
  const child = spawn(process.execPath, [...process.execArgv, '-e', code], { stdio: ['ignore', 'pipe', 'ignore'] });
  let out = '';
  child.stdout.on('data', chunk => {
    out += chunk;
  });
  return { child, done: new Promise<string>(done => child.on('close', () => done(out.trim()))) };
}

// ---- Tests ----------------------------------------------------------------------------------------------------------

test('a model arrives in the layout that all tools share, and only what is needed of it', async () => {
  assertWhole(await resolveModel('org/name'));
  const { files } = repo;
  const at = `snapshots/${COMMIT}`;
  assert.deepEqual(
    everything(folder()).filter(name => !fs.statSync(path.join(folder(), name)).isDirectory()),
    [
      `.no_exist/${COMMIT}/tokenizer_config.json`,
      ...[gitId(files['config.json']!), gitId(files['tokenizer.json']!), sha256(files['model.safetensors']!)]
        .map(etag => `blobs/${etag}`)
        .sort(),
      'refs/main',
      ...['config.json', 'model.safetensors', 'tokenizer.json'].map(name => `${at}/${name}`),
    ],
  );
  assert.equal(fs.readFileSync(path.join(folder(), 'refs/main'), 'utf8'), COMMIT);
  const link = fs.readlinkSync(path.join(folder(), at, 'model.safetensors'));
  assert.equal(link, `../../blobs/${sha256(files['model.safetensors']!)}`);
  assert.deepEqual(
    log.filter(r => /bin|README/.test(r.url)),
    [],
  );
});

test('what is in the cache is used without network', async () => {
  const snapshot = await resolveModel('org/name');
  await resolveModel('org/name@branch/of-mine');
  log = [];
  for (const offline of ['', '1']) {
    process.env.HF_HUB_OFFLINE = offline;
    for (const revision of ['', '@main', '@branch/of-mine', `@${COMMIT}`])
      assert.equal(await resolveModel(`org/name${revision}`), snapshot);
  }
  assert.deepEqual(log, []);
  fs.rmSync(path.join(snapshot, 'tokenizer.json')); // another tool may have fetched only a part
  assert.equal(await resolveModel('org/name'), snapshot);
  process.env.HF_HUB_OFFLINE = '';
  assertWhole(await resolveModel('org/name'));
  fs.rmSync(path.join(folder(), 'refs'), { recursive: true });
  fs.rmSync(path.join(snapshot, 'model.safetensors'));
  process.env.HF_HUB_OFFLINE = 'yes';
  log = [];
  await refused(resolveModel('org/name'), /org\/name: .* not in the cache .*HF_HUB_OFFLINE/);
  await refused(resolveModel(`org/name@${COMMIT}`), /not in the cache/);
  assert.deepEqual(log, []);
});

test('a local folder is taken as it is; what is neither folder nor id is refused', async () => {
  assert.equal(await resolveModel(root), root);
  for (const spec of ['name', 'a/b/c', './org/name', '../x/y', 'org/..', 'org/name@', 'org/name@../x', 'o/n x', ''])
    await refused(resolveModel(spec), /no such file or folder, and no hub id/);
  assert.deepEqual(log, []);
});

test('the token goes to the Hub and to no other host', async () => {
  let hops = 0;
  storage = (request, response, name) => {
    if (hops++ === 0) response.writeHead(302, { location: `http://127.0.0.1:${port(store)}/${name}` }).end();
    else send(request, response, repo.files[name]!);
  };
  await resolveModel('org/name');
  assert.ok(log.some(r => r.host === 'storage') && hops === 2);
  for (const r of log) assert.equal(r.token, r.host === 'hub' ? `Bearer ${TOKEN}` : undefined, r.url);
});

test('cache and token are looked for where the Python library looks', async () => {
  const home = path.join(root, `home-${runs}`);
  const places: [NodeJS.ProcessEnv, string, string][] = [
    [{ HF_HUB_CACHE: `${home}/1`, HF_HOME: `${home}/2` }, '1', '2/token'],
    [{ HF_HUB_CACHE: '', HF_HOME: `${home}/2`, XDG_CACHE_HOME: `${home}/3` }, '2/hub', '2/token'],
    [{ HF_HOME: '', XDG_CACHE_HOME: `${home}/3` }, '3/huggingface/hub', '3/huggingface/token'],
    [{ XDG_CACHE_HOME: '' }, '.cache/huggingface/hub', '.cache/huggingface/token'],
    [{ HF_HUB_CACHE: '~/4', HF_TOKEN_PATH: '~/5' }, '4', '5'],
    [{ HF_HUB_CACHE: '', HUGGINGFACE_HUB_CACHE: `${home}/6`, HF_HOME: `${home}/2`, HF_TOKEN_PATH: '' }, '6', '2/token'],
    [{ HF_HUB_CACHE: `${home}/7`, HUGGINGFACE_HUB_CACHE: `${home}/6` }, '7', '2/token'],
    [{ HF_HUB_CACHE: '$HOME/8', HF_TOKEN_PATH: `\${HOME}/$NOT_SET` }, '8', '$NOT_SET'],
  ];
  for (const [env, where, token] of places) {
    Object.assign(process.env, { HOME: home, HF_TOKEN: '' }, env);
    fs.mkdirSync(path.dirname(path.join(home, token)), { recursive: true });
    fs.writeFileSync(path.join(home, token), ` from ${token}\n`.replace(/ from /, 'hf_'));
    log = [];
    const snapshot = await resolveModel('org/name');
    assert.equal(snapshot, path.join(home, where, 'models--org--name/snapshots', COMMIT));
    assert.equal(log[0]?.token, `Bearer hf_${token}`);
    fs.rmSync(home, { recursive: true });
  }
  Object.assign(process.env, { HF_HUB_CACHE: `${home}/9`, HF_TOKEN_PATH: '', HF_HOME: '' });
  log = [];
  await resolveModel('org/name');
  assert.ok(log.every(r => r.token === undefined)); // no token at all
  Object.assign(process.env, { HF_HUB_CACHE: `${home}/10`, HUGGING_FACE_HUB_TOKEN: 'hf_old' });
  log = [];
  await resolveModel('org/name');
  assert.equal(log[0]?.token, 'Bearer hf_old');
});

test('a sharded model comes with its index and its shards', async () => {
  const { 'model.safetensors': weights, ...rest } = repo.files;
  const [a, b] = [weights!.subarray(0, 100), weights!.subarray(100)];
  const shards = { 'model-00001-of-00002.safetensors': a, 'model-00002-of-00002.safetensors': b };
  const index = (map: object) => ({ 'model.safetensors.index.json': Buffer.from(JSON.stringify({ weight_map: map })) });
  const [first, second] = Object.keys(shards) as [string, string];
  repo.files = { ...rest, ...shards, ...index({ x: second, y: first, z: second }) };
  const names = ['model.safetensors.index.json', first, second];
  assertWhole(await resolveModel('org/name'), names);
  fs.rmSync(path.join(folder(), 'snapshots', COMMIT, second)); // the others alone are not the model
  assertWhole(await resolveModel('org/name'), names);
  assert.equal(gets(first).length, 1);
  for (const name of ['../../evil.safetensors', '/etc/evil.safetensors', 'pytorch_model.bin', 'a/b.safetensors']) {
    process.env.HF_HUB_CACHE = cache = path.join(root, `cache-${runs++}`);
    repo.files = { ...rest, ...index({ x: name }) };
    await refused(resolveModel('org/name'), /is not the name of a shard/);
  }
});

test('a repository without what we can read is refused by name', async () => {
  delete repo.files['model.safetensors'];
  await refused(resolveModel('org/name'), /org\/name: no model\.safetensors \(pickled/);
  repo.files = { 'model.safetensors': Buffer.from('x') };
  await refused(resolveModel('org/name'), /no config\.json/);
});

test('what the Hub answers is told in one line', async () => {
  const answers: [number, RegExp][] = [
    [401, /org\/name: HTTP 401 .*HF_TOKEN.* Say "please"/],
    [403, /HTTP 403 .*accept its terms/],
    [404, /HTTP 404 .*not found/],
    [418, /HTTP 418/],
    [429, /HTTP 429/],
    [500, /HTTP 500/],
    [503, /HTTP 503/],
  ];
  for (const [status, message] of answers) {
    api = (_, response) => response.writeHead(status, { 'x-error-message': 'Say "please"' }).end('<html>\n');
    await refused(resolveModel('org/name'), message);
    api = undefined;
    resolve = api;
    resolve = (_, response) => response.writeHead(status, { 'x-error-message': 'Say "please"' }).end();
    await refused(resolveModel('org/name'), message);
    resolve = undefined;
  }
  for (const body of ['<html>', '{}', 'null', '[]', '{"sha":"../../x","siblings":[]}', '{"sha":']) {
    api = (_, response) => response.end(body);
    await refused(resolveModel('org/name'), /revision\/main/);
  }
  api = (request, response) => response.writeHead(302, { location: request.url }).end();
  await refused(resolveModel('org/name'), /too many redirects/);
  const closed = http.createServer().listen(0, '127.0.0.1');
  await new Promise(done => closed.on('listening', done));
  process.env.HF_ENDPOINT = `http://127.0.0.1:${port(closed)}`;
  await new Promise(done => closed.close(done));
  await refused(resolveModel('org/name'), /ECONNREFUSED/);
  assert.deepEqual(everything(cache), []);
});

test('a failure that passes is survived', async () => {
  let left = 3;
  api = (_, response) => {
    if (--left === 0) api = undefined;
    response.writeHead(left === 2 ? 429 : 503).end();
  };
  let broken = 2;
  storage = (request, response, name) => {
    if (broken-- > 0) response.writeHead(503).end();
    else send(request, response, repo.files[name]!);
  };
  assertWhole(await resolveModel('org/name'));
});

test('a connection that is cut goes on where it stopped', async () => {
  const from = ({ range }: { range?: string | undefined }) => Number(/bytes=(\d+)-/.exec(range ?? '')?.[1] ?? 0);
  storage = (request, response, name) => {
    send(request, response, repo.files[name]!, from(request.headers) + 40_000);
  };
  assertWhole(await resolveModel('org/name'));
  const requests = gets('model.safetensors');
  assert.ok(requests.length >= 8, `${requests.length} requests`); // more cuts than failures in a row are borne
  const starts = requests.map(from);
  assert.deepEqual(
    starts,
    starts.toSorted((x, y) => x - y),
  ); // never back
  assert.ok(requests.filter(r => r.range).every(r => r.ifRange === '"stored"'));
});

test('a storage without ranges, with wrong ranges, or with another file meanwhile: the right bytes all the same', async () => {
  const afterCut = (then: Handler): Handler => {
    let first = true;
    return (request, response, name) => {
      if (!first) return then(request, response, name);
      first = false;
      send(request, response, repo.files[name]!, 70_000);
    };
  };
  const whole: Handler = (_, response, name) => response.end(repo.files[name]);
  let wrong = 1;
  const wrongRange: Handler = (request, response, name) => {
    if (wrong-- <= 0) return send(request, response, repo.files[name]!);
    response.writeHead(206, { 'content-range': 'bytes 0-9/300000' }).end(repo.files[name]!.subarray(0, 10));
  };
  const refusesRange: Handler = (request, response, name) =>
    request.headers.range ? void response.writeHead(416).end() : send(request, response, repo.files[name]!);
  for (const then of [whole, wrongRange, refusesRange]) {
    process.env.HF_HUB_CACHE = cache = path.join(root, `cache-${runs++}`);
    storage = afterCut(then);
    assertWhole(await resolveModel('org/name'));
  }
});

test('slow is not broken; silence is given up and tried again', async () => {
  storage = (_, response, name) => {
    const content = repo.files[name]!;
    let sent = 0;
    const timer = setInterval(() => {
      sent += 50_000;
      response.write(content.subarray(sent - 50_000, sent));
      if (sent < content.length) return;
      clearInterval(timer);
      response.end();
    }, 100); // longer than the timeout in all
  };
  assertWhole(await resolveModel('org/name'));
  assert.equal(gets('model.safetensors').length, 1);
  process.env.HF_HUB_CACHE = cache = path.join(root, `cache-${runs++}`);
  let calls = 0;
  storage = (request, response, name) => {
    if (calls++ > 0) return send(request, response, repo.files[name]!);
    response.writeHead(200, { 'content-length': 300_000 });
    response.write(repo.files[name]!.subarray(0, 1000)); // and then nothing more
  };
  assertWhole(await resolveModel('org/name'));
  process.env.HF_HUB_CACHE = cache = path.join(root, `cache-${runs++}`);
  process.env.HF_HUB_DOWNLOAD_TIMEOUT = '0.1';
  storage = () => {};
  await refused(resolveModel('org/name'), /model\.safetensors: .*no answer in time/);
});

test('a wrong size or a wrong hash is never taken for the file', async () => {
  const right = repo.files['model.safetensors']!;
  const damaged = Buffer.from(right);
  damaged[123_456]! ^= 1;
  const sent: [Buffer, RegExp][] = [
    [damaged, /model\.safetensors came with the sha256 [0-9a-f]{64} instead of [0-9a-f]{64}; thrown away/],
    [Buffer.concat([right, Buffer.from('more')]), /300004 bytes instead of 300000/],
    [right.subarray(0, 200_000), /200000 of 300000 bytes|HTTP 416/],
    [Buffer.alloc(0), /0 of 300000 bytes|HTTP 416/],
  ];
  for (const [content, message] of sent) {
    storage = (request, response) =>
      content.length > 0 ? send(request, response, content) : void response.writeHead(200).end();
    await refused(resolveModel('org/name'), message);
    const blob = path.join(folder(), 'blobs', sha256(right));
    assert.ok(!fs.existsSync(blob) && !fs.existsSync(path.join(folder(), 'snapshots', COMMIT, 'model.safetensors')));
  }
  storage = (request, response, name) => send(request, response, repo.files[name]!);
  assertWhole(await resolveModel('org/name'));
  // the small files are checked too: their etag is git's id
  process.env.HF_HUB_CACHE = cache = path.join(root, `cache-${runs++}`);
  resolve = (_, response) => response.writeHead(200, { etag: `"${gitId(right)}"` }).end('{}');
  await refused(resolveModel('org/name'), /config\.json came with the sha1/);
  assert.deepEqual(
    everything(cache).filter(name => /blobs\/|snapshots\//.test(name)),
    [],
  );
});

test('an answer without an etag is refused, one without a size or a hash is taken', async () => {
  resolve = (_, response) => response.end('{}');
  await refused(resolveModel('org/name'), /has no etag/);
  resolve = (_, response) => response.writeHead(200, { etag: '"../../evil"' }).end('{}');
  await refused(resolveModel('org/name'), /has no etag/);
  resolve = (request, response, name) => {
    response.writeHead(200, { etag: `"${name}-v1"`, 'transfer-encoding': 'chunked' });
    response.end(request.method === 'HEAD' ? undefined : repo.files[name]);
  };
  assertWhole(await resolveModel('org/name'));
});

test('a killed download leaves nothing that looks whole, and the next one takes it over', {
  timeout: 30_000,
}, async () => {
  storage = (request, response, name) => {
    const content = repo.files[name]!;
    if (request.headers.range) return send(request, response, content);
    response.writeHead(200, { etag: '"stored"', 'content-length': content.length });
    response.write(content.subarray(0, 120_000)); // and hangs
  };
  process.env.HF_HUB_DOWNLOAD_TIMEOUT = '20';
  const { child, done } = inProcess();
  while (!partial().some(name => fs.statSync(path.join(cache, name)).size === 120_000))
    await new Promise(next => setTimeout(next, 20));
  child.kill('SIGKILL');
  await done;
  const snapshot = path.join(folder(), 'snapshots', COMMIT);
  assert.ok(!fs.existsSync(path.join(snapshot, 'model.safetensors')) && !fs.existsSync(path.join(folder(), 'refs')));
  process.env.HF_HUB_OFFLINE = '1';
  await refused(resolveModel(`org/name@${COMMIT}`), /not in the cache/);
  process.env.HF_HUB_OFFLINE = '';
  log = [];
  assertWhole(await resolveModel('org/name'));
  assert.deepEqual(
    gets('model.safetensors').map(r => r.range),
    ['bytes=120000-'],
  );
  assert.deepEqual(
    log.filter(r => r.url.includes('/config.json')),
    [],
  ); // what was whole is not fetched again
  storage = (request, response, name) => send(request, response, repo.files[name]!);
  // what is left may be damaged: then it is thrown away, and the next try starts over
  const blob = path.join(folder(), 'blobs', sha256(repo.files['model.safetensors']!));
  fs.renameSync(blob, `${blob}.${os.hostname()}.${child.pid}.incomplete`);
  fs.writeFileSync(`${blob}.${os.hostname()}.${child.pid}.incomplete`, 'damaged');
  fs.rmSync(path.join(folder(), 'refs'), { recursive: true });
  await refused(resolveModel('org/name'), /came with the sha256/);
  assertWhole(await resolveModel('org/name'));
});

test('two processes at once do not disturb each other', { timeout: 30_000 }, async () => {
  storage = (request, response, name) => setTimeout(() => send(request, response, repo.files[name]!), 100);
  process.env.HF_HUB_DOWNLOAD_TIMEOUT = '20';
  const results = await Promise.all([inProcess().done, inProcess().done, inProcess().done]);
  for (const snapshot of results) assertWhole(snapshot);
});

test('the training split of a data set comes shard by shard', async () => {
  const parquet = (...names: string[]) => Object.fromEntries(names.map(n => [n, Buffer.from(`content of ${n}`)]));
  const train = ['data/train-00000-of-00002.parquet', 'data/train-00001-of-00002.parquet'];
  repo.id = 'datasets/org/corpus';
  repo.files = parquet(train[1]!, train[0]!, 'data/test-00000-of-00001.parquet', '../../train-evil.parquet');
  repo.files['README.md'] = Buffer.from('# Data');
  const shards: string[] = [];
  for await (const shard of datasetShards('org/corpus')) {
    shards.push(shard);
    assert.equal(log.filter(r => r.host === 'storage').length, shards.length); // the next is not fetched yet
  }
  const snapshot = path.join(cache, 'datasets--org--corpus/snapshots', COMMIT);
  assert.deepEqual(
    shards,
    train.map(name => path.join(snapshot, name)),
  );
  assert.equal(fs.readFileSync(shards[1]!, 'utf8'), `content of ${train[1]}`);
  assert.ok(log.some(r => r.url.startsWith('/datasets/org/corpus/resolve/')));

  const all = async () => {
    for await (const _ of datasetShards('org/corpus'));
  };
  repo.files = parquet('en/train.parquet', 'fr/train.parquet');
  await refused(all(), /several subsets \(en, fr\)/);
  repo.files = { 'data.csv': Buffer.from('a,b') };
  log = [];
  await refused(all(), /org\/corpus: no parquet files/);
  assert.ok(log.some(r => r.url.includes('refs%2Fconvert%2Fparquet'))); // the Hub's own conversion was looked for
});

// ---- Without network ------------------------------------------------------------------------------------------------

const TRAIN = ['data/train-00000-of-00002.parquet', 'data/train-00001-of-00002.parquet'];
function serveDataset(names = TRAIN): void {
  repo.id = 'datasets/org/corpus';
  repo.files = Object.fromEntries(names.map(name => [name, Buffer.from(`content of ${name}`)]));
}
/** The contents of the first `most` shards. */
async function readShards(spec = 'org/corpus', most = Infinity): Promise<string[]> {
  const contents: string[] = [];
  for await (const shard of datasetShards(spec)) {
    contents.push(fs.readFileSync(shard, 'utf8'));
    if (contents.length >= most) break;
  }
  return contents;
}
const contentsOf = (names: string[]) => names.map(name => `content of ${name}`);
const corpusFolder = () => path.join(cache, 'datasets--org--corpus');

/** What the job writes to standard error. */
async function saidBy(job: () => Promise<unknown>): Promise<string> {
  const write = process.stderr.write;
  let said = '';
  process.stderr.write = (text: string | Uint8Array) => {
    said += text;
    return true;
  };
  try {
    await job();
  } finally {
    process.stderr.write = write;
  }
  return said;
}
async function closedPort(): Promise<number> {
  const closed = http.createServer().listen(0, '127.0.0.1');
  await new Promise(done => closed.on('listening', done));
  const free = port(closed);
  await new Promise(done => closed.close(done));
  return free;
}

test('a data set that is in the cache is read without network', async () => {
  serveDataset();
  assert.deepEqual(await readShards(), contentsOf(TRAIN));
  assert.equal(datasetCommit('org/corpus'), COMMIT);
  log = [];
  for (const name of ['HF_HUB_OFFLINE', 'TRANSFORMERS_OFFLINE']) {
    process.env[name] = '1';
    for (const spec of ['org/corpus', 'org/corpus@main', `org/corpus@${COMMIT}`]) {
      assert.deepEqual(await readShards(spec), contentsOf(TRAIN));
      assert.equal(datasetCommit(spec), COMMIT);
    }
    delete process.env[name];
  }
  assert.deepEqual(await readShards(`org/corpus@${COMMIT}`), contentsOf(TRAIN)); // a commit never changes
  assert.deepEqual(log, []);
  Object.assign(process.env, { HF_HUB_OFFLINE: '0', TRANSFORMERS_OFFLINE: '1' }); // the first one counts
  await readShards();
  assert.ok(log.length > 0);
  assert.equal(datasetCommit(root), undefined); // of files there is none
});

test('what is not in the cache of a data set is refused by name, never left out', async () => {
  serveDataset();
  assert.deepEqual(await readShards('org/corpus', 1), contentsOf(TRAIN.slice(0, 1)));
  process.env.HF_HUB_OFFLINE = '1';
  const second = /org\/corpus: data\/train-00001-of-00002\.parquet is not in the cache .*HF_HUB_OFFLINE is set/;
  assert.deepEqual(await readShards('org/corpus', 1), contentsOf(TRAIN.slice(0, 1)));
  await refused(readShards(), second);
  fs.rmSync(path.join(corpusFolder(), '.shards'), { recursive: true }); // as another tool leaves it
  assert.deepEqual(await readShards('org/corpus', 1), contentsOf(TRAIN.slice(0, 1)));
  await refused(readShards(), second);
  const snapshot = path.join(corpusFolder(), 'snapshots', COMMIT, 'data');
  for (const other of ['test', 'validation']) {
    const [first] = fs.readdirSync(snapshot); // another tool fetched no training split
    fs.renameSync(path.join(snapshot, first!), path.join(snapshot, `${other}-00000-of-00001.parquet`));
    await refused(readShards(), /the list of its files is not in the cache/);
  }
  delete process.env.HF_HUB_OFFLINE;
  process.env.TRANSFORMERS_OFFLINE = 'yes';
  await refused(readShards(), /TRANSFORMERS_OFFLINE is set/);
  await refused(readShards('org/corpus@other'), /org\/corpus@other: the list of its files is not in the cache/);
  await refused(readShards('org/other'), /not in the cache/);
});

test("the Hub's own conversion of a data set is read without network too", async () => {
  serveDataset(['default/train/0000.parquet', 'default/train/0001.parquet']);
  api = (request, response) => {
    const converted = request.url!.includes('refs%2Fconvert%2Fparquet');
    const names = converted ? Object.keys(repo.files) : ['data.csv'];
    response.end(JSON.stringify({ sha: head, siblings: names.map(rfilename => ({ rfilename })) }));
  };
  const contents = await readShards('org/corpus', 1);
  assert.deepEqual(contents, contentsOf(['default/train/0000.parquet']));
  process.env.HF_HUB_OFFLINE = '1';
  log = [];
  assert.deepEqual(await readShards('org/corpus', 1), contents);
  assert.equal(datasetCommit('org/corpus'), COMMIT);
  await refused(readShards(), /default\/train\/0001\.parquet is not in the cache/);
  assert.deepEqual(log, []);
});

test('where the Hub can not be reached the cache serves, and that is said', { timeout: 30_000 }, async () => {
  serveDataset();
  await readShards();
  const unwell: [string, Handler | 'gone'][] = [
    ['ECONNREFUSED', 'gone'],
    ['HTTP 503', (_, response) => response.writeHead(503).end()],
    ['no answer in time', () => {}],
  ];
  for (const [why, handler] of unwell) {
    if (handler !== 'gone') api = handler;
    process.env.HF_ENDPOINT = `http://127.0.0.1:${handler === 'gone' ? await closedPort() : port(hub)}`;
    const said = await saidBy(async () => assert.deepEqual(await readShards(), contentsOf(TRAIN)));
    assert.match(
      said,
      new RegExp(`^warning {2}org/corpus: the list of its files: \\S+ ${why}; going on with what is in`),
    );
    assert.equal(said.split('\n').length, 2);
    assert.equal(await saidBy(() => readShards()), '', 'once is enough');
  }
  // an answer is an answer: the cache does not hide that a data set is gone or closed
  for (const status of [401, 404]) {
    api = (_, response) => response.writeHead(status).end();
    await assert.rejects(readShards(), { name: 'UsageError', message: new RegExp(`HTTP ${status}`) });
  }
});

test('a model of which only the tokenizer is unknown serves where the Hub can not be reached', async () => {
  const snapshot = await resolveModel('org/name');
  fs.rmSync(path.join(snapshot, 'tokenizer.json')); // another tool fetched the rest
  process.env.HF_ENDPOINT = `http://127.0.0.1:${await closedPort()}`;
  const said = await saidBy(async () => assert.equal(await resolveModel('org/name'), snapshot));
  assert.match(said, /^warning {2}org\/name: .*ECONNREFUSED; going on with what is in the cache\n$/);
  fs.rmSync(path.join(snapshot, 'model.safetensors'));
  await assert.rejects(resolveModel('org/name'), { name: 'UsageError', message: /ECONNREFUSED/ });
});

test('the commit is known, of a model and of a data set, and a revision can be pinned to it', async () => {
  assert.deepEqual(await resolveWithCommit(root), { dir: root });
  const dir = path.join(folder(), 'snapshots', COMMIT);
  for (const spec of ['org/name', 'org/name', `org/name@${COMMIT}`])
    assert.deepEqual(await resolveWithCommit(spec), { dir, commit: COMMIT }); // downloaded, then cached
  serveDataset();
  await readShards();
  const before = { ...repo.files };
  head = 'facade'.padEnd(40, '0');
  repo.files = Object.fromEntries(TRAIN.map(name => [name, Buffer.from(`new ${name}`)]));
  // the branch has moved, but nothing of it arrives: what the cache knows stays as it is
  storage = (_, response) => response.writeHead(404).end();
  await assert.rejects(readShards(), { name: 'UsageError', message: /404/ });
  assert.equal(datasetCommit('org/corpus'), COMMIT);
  storage = (request, response, name) => send(request, response, repo.files[name]!);
  assert.deepEqual(
    await readShards(),
    TRAIN.map(name => `new ${name}`),
  );
  assert.equal(datasetCommit('org/corpus'), head);
  assert.deepEqual(await readShards(`org/corpus@${COMMIT}`), Object.values(before).map(String));
  assert.equal(datasetCommit(`org/corpus@${COMMIT}`), COMMIT);
});

// ---- Proxies --------------------------------------------------------------------------------------------------------

test('which addresses go through which proxy is as in the Python library', () => {
  const file = path.join(import.meta.dirname, '../tools/fixtures/proxies.json');
  const { addresses, cases } = JSON.parse(fs.readFileSync(file, 'utf8')) as {
    addresses: string[];
    cases: { variables: Record<string, string>; proxies: (string | null)[] }[];
  };
  for (const { variables, proxies } of cases) {
    for (const name of Object.keys(process.env)) if (/_proxy$/i.test(name)) delete process.env[name];
    Object.assign(process.env, variables);
    const found = addresses.map(address => proxyFor(new URL(address))?.host ?? null);
    assert.deepEqual(found, proxies, JSON.stringify(variables));
  }
  assert.ok(cases.length > 20);
  for (const name of Object.keys(process.env)) if (/_proxy$/i.test(name)) delete process.env[name];
  for (const [value, message] of [
    ['ftp://p:1', /^HTTP_PROXY: ftp:\/\/ is not done; takes http:/],
    ['http://p:port', /^HTTP_PROXY: Invalid URL/],
  ] as const) {
    process.env.http_proxy = value;
    assert.throws(() => proxyFor(new URL('http://example.com')), { name: 'UsageError', message });
  }
});

/** A proxy that knows where hub.invalid is, and logs what it is asked for. */
async function startProxy(answer?: number) {
  const asked: { request: string; auth: string | undefined }[] = [];
  const proxy = http.createServer((request, response) => {
    asked.push({ request: `${request.method} ${request.url}`, auth: request.headers['proxy-authorization'] });
    if (answer) return void response.writeHead(answer).end();
    const { hostname, port: asking, pathname, search } = new URL(request.url!);
    const to = hostname === 'hub.invalid' ? port(hub) : asking;
    const options = { host: hostname === 'hub.invalid' ? '127.0.0.1' : hostname, port: to, path: pathname + search };
    const onward = http.request({ ...options, method: request.method, headers: request.headers }, answer => {
      response.writeHead(answer.statusCode!, answer.headers);
      answer.pipe(response);
    });
    request.pipe(onward);
  });
  proxy.on('connect', (request, socket) => {
    asked.push({ request: `CONNECT ${request.url}`, auth: request.headers['proxy-authorization'] });
    socket.end(`HTTP/1.1 ${answer ?? 502} no\r\n\r\n`);
  });
  await new Promise<void>(done => proxy.listen(0, '127.0.0.1', done));
  const close = () => {
    proxy.closeAllConnections();
    proxy.close();
  };
  return { asked, at: `127.0.0.1:${port(proxy)}`, close };
}

test('models come through a proxy: the Hub and its storage, but for what NO_PROXY says', {
  timeout: 30_000,
}, async () => {
  for (const [name, exempt] of [
    ['HTTP_PROXY', ''],
    ['http_proxy', 'localhost'], // where the storage is
    ['ALL_PROXY', ''],
  ] as const) {
    const { asked, at, close } = await startProxy();
    process.env.HF_HUB_CACHE = cache = path.join(root, `cache-${runs++}`);
    Object.assign(process.env, {
      HF_ENDPOINT: 'http://hub.invalid',
      [name]: `http://me:p%40ss@${at}`,
      NO_PROXY: exempt,
    });
    assertWhole(await resolveModel('org/name'));
    assert.ok(asked.length >= (exempt ? 8 : 9), `${asked.length} requests`);
    assert.equal(asked.filter(({ request }) => /GET http:\/\/localhost:/.test(request)).length, exempt ? 0 : 1);
    for (const { auth } of asked) assert.equal(auth, `Basic ${Buffer.from('me:p@ss').toString('base64')}`);
    delete process.env[name];
    close();
  }
});

test('an https address is asked for through a tunnel; what a proxy refuses is told', { timeout: 30_000 }, async () => {
  process.env.HF_HUB_DOWNLOAD_TIMEOUT = '0.1';
  const answers: [string, string, number | undefined, RegExp][] = [
    ['https', 'HTTPS_PROXY', undefined, /org\/name: .*https:\/\/hub\.invalid: through the proxy \S+: .*502/],
    ['https', 'all_proxy', 407, /org\/name: the proxy \S+ asks for a user and a password/],
    ['http', 'HTTP_PROXY', 407, /org\/name: the proxy \S+ asks for a user and a password/],
  ];
  for (const [scheme, name, answer, message] of answers) {
    const { asked, at, close } = await startProxy(answer);
    Object.assign(process.env, { HF_ENDPOINT: `${scheme}://hub.invalid`, [name]: at });
    await refused(resolveModel('org/name'), message);
    const wanted =
      scheme === 'https' ? 'CONNECT hub.invalid:443' : 'GET http://hub.invalid/api/models/org/name/revision/main';
    assert.ok(asked.length > 0 && asked.every(({ request }) => request === wanted), JSON.stringify(asked));
    delete process.env[name];
    close();
  }
  process.env.HTTP_PROXY = `http://127.0.0.1:${await closedPort()}`;
  process.env.HF_ENDPOINT = 'http://hub.invalid';
  await refused(resolveModel('org/name'), /http:\/\/hub\.invalid: through the proxy 127\.0\.0\.1:\d+: ECONNREFUSED/);
  process.env.HTTP_PROXY = 'ftp://p:1';
  await refused(resolveModel('org/name'), /org\/name: HTTP_PROXY: ftp:/);
});
