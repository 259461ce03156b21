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
import { datasetShards, resolveModel } from '../io/hub.ts';
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
    return void response.end(JSON.stringify({ sha: COMMIT, siblings }));
  }
  const [, name = ''] = new RegExp(`/resolve/${COMMIT}/(.*)`).exec(url) ?? [];
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
  [api, resolve] = [undefined, undefined];
  storage = (request, response, name) => send(request, response, repo.files[name]!);
  log = [];
  cache = path.join(root, `cache-${runs++}`);
  for (const name of Object.keys(process.env)) if (/^HF_|^XDG_CACHE/.test(name)) delete process.env[name];
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
  const code = `import(${JSON.stringify(MODULE)}).then(m => m.resolveModel(${JSON.stringify(spec)})).then(console.log)`;
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
  Object.assign(process.env, { HF_HUB_CACHE: `${home}/6`, HF_TOKEN_PATH: '' });
  log = [];
  await resolveModel('org/name');
  assert.ok(log.every(r => r.token === undefined)); // no token at all
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
