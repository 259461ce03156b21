import { createHash } from 'node:crypto';
import * as fs from 'node:fs';
import * as os from 'node:os';
import * as path from 'node:path';
import { Readable } from 'node:stream';
import { pipeline } from 'node:stream/promises';
import { setTimeout as sleep } from 'node:timers/promises';
import { showLive } from './console.ts';
import { fetchThroughProxy } from './proxy.ts';
import { UsageError } from './usage-error.ts';

// Models and data sets by name, through the cache that all Hugging Face tools share:
//   models--org--name/blobs/<etag>               the content of a file, once
//   models--org--name/snapshots/<commit>/<file>  a link to its blob
//   models--org--name/refs/<revision>            the commit at which a branch or tag stands
// Our own lines instead of @huggingface/hub: that one checks neither size nor hash, never resumes, shares one temporary
// file between processes and reads none of HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE. A wrapper that adds all this would
// be as long as these requests.

const INDEX = 'model.safetensors.index.json';

interface Repo {
  /** as the user wrote it */
  spec: string;
  kind: 'models' | 'datasets';
  id: string;
  revision: string;
  folder: string;
  hub: { endpoint: string; token: string; offlineBy: string | undefined; timeout: number }; // a variable's name
}

/** `org/name[@revision]`, and the settings in the variables that the Python library reads. */
function parseRepo(spec: string, kind: Repo['kind']): Repo {
  const [, id, revision = 'main'] = /^(\w[\w.-]*\/\w[\w.-]*)(?:@(\w[\w./-]*))?$/.exec(spec) ?? [];
  if (!id || spec.includes('..'))
    throw new UsageError(`${spec}: no such file or folder, and no hub id (org/name[@revision])`);
  const env = (name: string) => process.env[name] || undefined; // set but empty is unset
  const expand = (p: string) =>
    p.replace(/^~(?=$|[/\\])/, os.homedir()).replace(/\$(?:(\w+)|\{(\w+)\})/g, (as, a, b) => process.env[a ?? b] ?? as);
  const home = expand(env('HF_HOME') ?? path.join(env('XDG_CACHE_HOME') ?? '~/.cache', 'huggingface'));
  const cache = expand(env('HF_HUB_CACHE') ?? env('HUGGINGFACE_HUB_CACHE') ?? path.join(home, 'hub'));
  const tokenFile = expand(env('HF_TOKEN_PATH') ?? path.join(home, 'token'));
  const offline = env('HF_HUB_OFFLINE') ? 'HF_HUB_OFFLINE' : 'TRANSFORMERS_OFFLINE';
  const hub = {
    endpoint: (env('HF_ENDPOINT') ?? 'https://huggingface.co').replace(/\/+$/, ''),
    token: (
      env('HF_TOKEN') ??
      env('HUGGING_FACE_HUB_TOKEN') ??
      (fs.existsSync(tokenFile) ? fs.readFileSync(tokenFile, 'utf8') : '')
    ).trim(),
    offlineBy: /^(1|on|yes|true)$/i.test(env(offline) ?? '') ? offline : undefined,
    timeout: 1000 * (Number(env('HF_HUB_DOWNLOAD_TIMEOUT')) || 30), // without a byte
  };
  return { spec, kind, id, revision, folder: path.join(cache, `${kind}--${id.replace('/', '--')}`), hub };
}

/**
 * A folder as it is; `org/name[@revision]` from the cache, else from the Hub into it.
 * @returns the folder, and the Hub's commit that it is a snapshot of
 */
export async function resolveModel(spec: string): Promise<{ dir: string; commit?: string }> {
  if (fs.existsSync(spec)) return { dir: spec };
  const repo = parseRepo(spec, 'models');
  const cached = cachedCommit(repo);
  if (cached && modelIsWhole(repo, cached)) return { dir: snapshotOf(repo, cached), commit: cached };
  const usable = cached && modelIsWhole(repo, cached, false) ? { commit: cached, files: [] } : undefined;
  const info = await orFromCache(repo, repoInfo(repo, usable !== undefined), usable);
  const { commit, files } = info;
  const snapshot = snapshotOf(repo, commit);
  if (info === usable) return { dir: snapshot, commit };
  const weights = ['model.safetensors', INDEX].find(name => files.includes(name));
  if (!weights) throw new UsageError(`${spec}: no model.safetensors (pickled .bin and .pt files are never loaded)`);
  if (!files.includes('config.json')) throw new UsageError(`${spec}: no config.json`);
  for (const name of ['config.json', 'tokenizer.json', 'tokenizer_config.json', weights]) {
    if (files.includes(name)) await download(repo, commit, name);
    else publish(path.join(repo.folder, '.no_exist', commit, name), ''); // so that nobody asks for it again
  }
  if (weights === INDEX) for (const shard of shardsOf(snapshot)) await download(repo, commit, shard);
  publish(path.join(repo.folder, 'refs', repo.revision), commit); // last: it stands for a whole snapshot
  return { dir: snapshot, commit };
}

/** The parquet files of a data set's training split in order, each downloaded when it is asked for. */
export async function* datasetShards(spec: string): AsyncGenerator<string> {
  let repo = parseRepo(spec, 'datasets');
  const known = cachedDataset(repo);
  let info = isCommit(repo.revision) && known?.listed ? known : await orFromCache(repo, repoInfo(repo, !!known), known);
  if (info !== known && parquetOf(info.files).length === 0 && !spec.includes('@')) {
    repo = { ...repo, revision: CONVERTED };
    info = await repoInfo(repo);
  }
  const shards = parquetOf(info.files);
  const folders = [...new Set(shards.map(name => path.posix.dirname(name)))];
  if (shards.length === 0) throw new UsageError(`${spec}: no parquet files`);
  if (folders.length > 1)
    throw new UsageError(`${spec}: several subsets (${folders.slice(0, 9).join(', ')}); download one, give its file`);
  for (const shard of shards) {
    const file = await download(repo, info.commit, shard);
    if (info !== known && shard === shards[0]) {
      publish(listOf(repo, info.commit), shards.map(name => `${name}\n`).join(''));
      publish(path.join(repo.folder, 'refs', repo.revision), info.commit);
    }
    yield file;
  }
}

/** The Hub's commit of a data set that `datasetShards` has read; undefined of a file. */
export function datasetCommit(spec: string): string | undefined {
  return fs.existsSync(spec) ? undefined : cachedDataset(parseRepo(spec, 'datasets'))?.commit;
}

/** The training split's parquet files among all files of a data set. */
function parquetOf(files: readonly string[]): string[] {
  const parquet = files.filter(name => name.endsWith('.parquet')).sort();
  const training = parquet.filter(name => /(^|[/._-])train([/._-]|$)/.test(name));
  return training.length > 0 ? training : parquet;
}

const warnings = new Set<string>();
/** What the cache holds serves where the Hub can't be reached, and that is said (once: a data set is opened twice). */
async function orFromCache<X>(repo: Repo, info: Promise<X>, cached: X | undefined): Promise<X> {
  return info.catch(error => {
    if (!(error instanceof UnreachableError) || cached === undefined) throw error;
    const warning = `warning  ${error.message}; going on with what is in the cache\n`;
    if (!repo.hub.offlineBy && !warnings.has(warning)) process.stderr.write(warning);
    warnings.add(warning);
    return cached;
  });
}

// ---- what the cache has

const isCommit = (revision: string) => /^[0-9a-f]{40}$/.test(revision);
const snapshotOf = (repo: Repo, commit: string) => path.join(repo.folder, 'snapshots', commit);

/** The commit at which the cache has seen the revision, if it has something of it. */
function cachedCommit(repo: Repo): string | undefined {
  const ref = path.join(repo.folder, 'refs', repo.revision);
  const commit = fs.existsSync(ref) ? fs.readFileSync(ref, 'utf8').trim() : repo.revision;
  return isCommit(commit) && fs.existsSync(snapshotOf(repo, commit)) ? commit : undefined;
}

/** Another tool may have fetched only a part of a model. @param sure whether it must be known to have no tokenizer.json */
function modelIsWhole(repo: Repo, commit: string, sure = !repo.hub.offlineBy): boolean {
  const snapshot = snapshotOf(repo, commit);
  const has = (name: string) => fs.existsSync(path.join(snapshot, name));
  const noTokenizer = path.join(repo.folder, '.no_exist', commit, 'tokenizer.json');
  const weights = has('model.safetensors') || (has(INDEX) && shardsOf(snapshot).every(has));
  return has('config.json') && weights && (has('tokenizer.json') || !sure || fs.existsSync(noTokenizer));
}

const CONVERTED = 'refs/convert/parquet'; // the Hub's own conversion of other formats
/** Our own list of a data set's shards: what other tools leave in the cache may be a part of them. */
const listOf = (repo: Repo, commit: string) => path.join(repo.folder, '.shards', commit);

/** A data set as far as the cache knows it: the names of all its shards (not all may be there), or those that are there. */
function cachedDataset(asked: Repo): { commit: string; files: string[]; listed: boolean } | undefined {
  const unnamed = !asked.spec.includes('@');
  for (const revision of [asked.revision, ...(unnamed ? [CONVERTED] : [])]) {
    const repo = { ...asked, revision };
    const commit = cachedCommit(repo);
    if (commit === undefined) continue;
    const list = listOf(repo, commit);
    if (fs.existsSync(list))
      return { commit, files: fs.readFileSync(list, 'utf8').split('\n').filter(Boolean), listed: true };
    const all = fs.readdirSync(snapshotOf(repo, commit), { recursive: true }) as string[];
    const names = all.map(name => name.split(path.sep).join('/'));
    const there = parquetOf(names.filter(name => !/(^|[/._-])(test|valid(ation)?|val|dev|eval)([/._-]|$)/.test(name)));
    if (there.length > 0) return { commit, files: numbered(there), listed: false };
  }
  return undefined;
}

/** All names of a numbered series, `x-00001-of-00003.parquet`, some of which are given. */
function numbered(names: string[]): string[] {
  const [, before, , count = 0, after] = /^(.*-)(\d{5})-of-(\d{5})(\.parquet)$/.exec(names[0]!) ?? [];
  const nameOf = (i: number) => `${before}${String(i).padStart(5, '0')}-of-${count}${after}`;
  const series = Array.from({ length: Number(count) }, (_, i) => nameOf(i));
  return names.every(name => series.includes(name)) ? series : names;
}

function shardsOf(snapshot: string): string[] {
  const file = path.join(snapshot, INDEX);
  const { weight_map } = JSON.parse(fs.readFileSync(file, 'utf8'));
  const shards = [...new Set(Object.values(weight_map ?? {}).map(String))].sort();
  const odd = shards.find(name => !/^\w[\w.-]*\.safetensors$/.test(name));
  if (odd !== undefined) throw new UsageError(`${file}: ${JSON.stringify(odd)} is not the name of a shard`);
  return shards;
}

/** Writes a whole file or none. */
function publish(file: string, content: string): void {
  fs.mkdirSync(path.dirname(file), { recursive: true });
  const beside = `${file}.${process.pid}`;
  fs.writeFileSync(beside, content);
  fs.renameSync(beside, file);
}

// ---- requests

/** What may pass when tried again: a network that fails, a server that is busy. */
class PassingError extends Error {}

/** The Hub can't be reached, or must not be asked. */
class UnreachableError extends UsageError {}

/**
 * Follows redirects by hand, so that the token goes to the Hub and to no other host (links to storage are signed).
 * @param abroad whether to follow a redirect to another host, or return it
 */
async function request(repo: Repo, address: string, abroad: boolean, init: RequestInit = {}): Promise<Response> {
  const { endpoint, token } = repo.hub;
  let url = new URL(address);
  for (let hop = 0; hop < 6; hop++) {
    const headers = new Headers(init.headers);
    headers.set('accept-encoding', 'identity'); // sizes and ranges are those of the file
    const atHome = url.origin === new URL(endpoint).origin;
    if (atHome && token) headers.set('authorization', `Bearer ${token}`);
    const response = await fetchThroughProxy(url, { ...init, headers, redirect: 'manual' }).catch(error => {
      if (error instanceof UsageError) throw new UsageError(`${repo.spec}: ${error.message}`);
      const why = init.signal?.aborted ? 'no answer in time' : (error.cause?.code ?? error.message);
      throw new PassingError(`${url.origin}: ${why}`);
    });
    const location = response.headers.get('location');
    if (response.status === 429 || response.status >= 500)
      throw new PassingError(`${url.origin}: HTTP ${response.status}`);
    if (response.status >= 400 && response.status !== 416) {
      const said = (response.headers.get('x-error-message') ?? '').replace(/\s+/g, ' ').slice(0, 200);
      const advice: Record<number, string> = {
        401: 'private or not there; set HF_TOKEN if you have access',
        403: 'access refused; accept its terms on the Hub, or use another HF_TOKEN',
        404: 'not found',
      };
      const why = atHome ? (advice[response.status] ?? '') : '';
      throw new UsageError(`${repo.spec}: HTTP ${response.status} from ${url.origin}: ${why} ${said}`.trim());
    }
    if (response.status < 300 || response.status >= 400 || !location) return response;
    const next = new URL(location, url);
    if (!abroad && next.origin !== url.origin) return response;
    await response.body?.cancel();
    url = next;
  }
  throw new UsageError(`${repo.spec}: too many redirects from ${address}`);
}

/** Tries again what may pass, until it fails `tries` times without getting further (`got` bytes). */
async function persist<R>(repo: Repo, what: string, attempt: () => Promise<R>, got = () => 0, tries = 5): Promise<R> {
  const { offlineBy } = repo.hub;
  if (offlineBy)
    throw new UnreachableError(`${repo.spec}: ${what} is not in the cache (${repo.folder}), and ${offlineBy} is set`);
  for (let failures = 0, most = 0; ; ) {
    try {
      return await attempt();
    } catch (error) {
      if (!(error instanceof PassingError)) throw error;
      failures = got() > most ? 1 : failures + 1;
      most = Math.max(most, got());
      if (failures === tries) throw new UnreachableError(`${repo.spec}: ${what}: ${error.message}`);
      await sleep((2 ** failures * repo.hub.timeout) / 60);
    }
  }
}

/** @param cached whether the cache could serve: then a Hub that does not answer is not waited for so long */
async function repoInfo(repo: Repo, cached = false): Promise<{ commit: string; files: string[] }> {
  const { hub, kind, id, revision } = repo;
  const address = `${hub.endpoint}/api/${kind}/${id}/revision/${encodeURIComponent(revision)}`;
  const ask = async () => {
    const response = await request(repo, address, false, { signal: AbortSignal.timeout(hub.timeout) });
    const info = (await response.json().catch(error => {
      throw new PassingError(`${address}: ${error.message}`);
    })) as { sha?: unknown; siblings?: { rfilename?: unknown }[] } | null;
    const commit = String(info?.sha);
    if (!/^[0-9a-f]{40}$/.test(commit)) throw new UsageError(`${repo.spec}: ${address} names no commit`);
    const files = (info?.siblings ?? []).map(sibling => String(sibling.rfilename));
    return { commit, files: files.filter(name => !/^\/|\\|(^|\/)\.\.?(\/|$)/.test(name)) }; // none outside the folder
  };
  return persist(repo, 'the list of its files', ask, undefined, cached ? 2 : 5);
}

/** One file of a commit into the cache. @returns its path in the snapshot */
async function download(repo: Repo, commit: string, name: string): Promise<string> {
  const file = path.join(repo.folder, 'snapshots', commit, name);
  if (fs.existsSync(file)) return file;
  const { hub, kind, id } = repo;
  const base = `${hub.endpoint}/${kind === 'datasets' ? 'datasets/' : ''}${id}`;
  const address = `${base}/resolve/${commit}/${encodeURIComponent(name).replaceAll('%2F', '/')}`;
  // The Hub itself says etag and size, also of files that are stored elsewhere: there the etag is their SHA-256.
  const { headers, status } = await persist(repo, name, () =>
    request(repo, address, false, { method: 'HEAD', signal: AbortSignal.timeout(hub.timeout) }),
  );
  const own = (header: string) => (status === 200 ? headers.get(header) : null); // not those of a redirect
  const etag = (headers.get('x-linked-etag') ?? own('etag') ?? '').replace(/^W\/|"/g, '');
  const size = headers.get('x-linked-size') ?? own('content-length');
  if (!/^\w[\w.-]*$/.test(etag)) throw new UsageError(`${repo.spec}: ${address} has no etag`);
  const blob = path.join(repo.folder, 'blobs', etag);
  if (!fs.existsSync(blob)) await fetchBlob(repo, address, name, blob, size === null ? undefined : Number(size));
  fs.mkdirSync(path.dirname(file), { recursive: true });
  const beside = `${file}.${process.pid}`;
  fs.rmSync(beside, { force: true });
  try {
    fs.symlinkSync(path.relative(path.dirname(file), blob), beside);
  } catch {
    fs.copyFileSync(blob, beside); // a system without links
  }
  fs.renameSync(beside, file);
  return file;
}

async function fetchBlob(repo: Repo, address: string, name: string, blob: string, size?: number): Promise<void> {
  fs.mkdirSync(path.dirname(blob), { recursive: true });
  const partial = takeOver(blob);
  const have = () => (fs.existsSync(partial) ? fs.statSync(partial).size : 0);
  let validator: string | null = null; // of the storage that the first bytes came from
  const attempt = async () => {
    const stalled = new AbortController();
    let timer: NodeJS.Timeout | undefined;
    const alive = () => {
      clearTimeout(timer);
      timer = setTimeout(() => stalled.abort(), repo.hub.timeout);
    };
    try {
      alive();
      const headers = { range: `bytes=${have()}-`, ...(validator && { 'if-range': validator }) };
      const response = await request(repo, address, true, {
        headers: have() > 0 ? headers : {},
        signal: stalled.signal,
      });
      const follows = response.status === 206 && response.headers.get('content-range')?.startsWith(`bytes ${have()}-`);
      if (!follows) fs.rmSync(partial, { force: true }); // the whole file comes, or (416) nothing fits: from the start
      if (response.status !== 200 && !follows) throw new PassingError(`HTTP ${response.status}`);
      validator = response.headers.get('etag')?.replace(/^W\/.*/, '') || null; // a weak one is no proof
      let done = have();
      const count = async function* (chunks: AsyncIterable<Uint8Array>) {
        for await (const chunk of chunks) {
          alive();
          done += chunk.length;
          showDownload(name, done, size);
          yield chunk;
        }
      };
      const body = Readable.fromWeb(response.body as import('node:stream/web').ReadableStream);
      await pipeline(body, count, fs.createWriteStream(partial, { flags: 'a' }));
    } catch (error) {
      if (
        error instanceof UsageError ||
        error instanceof PassingError ||
        (error as { syscall?: string }).syscall === 'write'
      )
        throw error;
      throw new PassingError(stalled.signal.aborted ? 'it stopped coming' : (error as Error).message);
    } finally {
      clearTimeout(timer);
    }
    if (size !== undefined && have() < size) throw new PassingError(`ended after ${have()} of ${size} bytes`);
  };
  if (size === undefined || have() < size) await persist(repo, name, attempt, have);
  const wrong = await whatIsWrong(partial, path.basename(blob), size);
  if (wrong) {
    fs.rmSync(partial);
    throw new UsageError(`${repo.spec}: ${name} came with ${wrong}; thrown away, try again`);
  }
  fs.renameSync(partial, blob);
}

/** A temporary file of our own; what a process that is gone has left of the same blob is taken over. */
function takeOver(blob: string): string {
  const mine = `${blob}.${os.hostname()}.${process.pid}.incomplete`;
  const alive = (pid: number) => {
    try {
      return process.kill(pid, 0);
    } catch (error) {
      return (error as NodeJS.ErrnoException).code === 'EPERM';
    }
  };
  for (const name of fs.readdirSync(path.dirname(blob))) {
    const [, pid] = /\.(\d+)\.incomplete$/.exec(name) ?? [];
    if (!pid || !name.startsWith(`${path.basename(blob)}.${os.hostname()}.`) || alive(Number(pid))) continue;
    try {
      fs.renameSync(path.join(path.dirname(blob), name), mine);
    } catch {} // another process was faster
  }
  return mine;
}

/** Checks size and hash: an etag of 64 digits is the file's SHA-256, one of 40 its id in git. */
async function whatIsWrong(file: string, etag: string, size?: number): Promise<string | undefined> {
  const bytes = fs.statSync(file).size;
  if (size !== undefined && bytes !== size) return `${bytes} bytes instead of ${size}`;
  const algorithm = { 64: 'sha256', 40: 'sha1' }[/^[0-9a-f]+$/.test(etag) ? etag.length : 0];
  if (!algorithm) return undefined;
  const hash = createHash(algorithm);
  if (algorithm === 'sha1') hash.update(`blob ${bytes}\0`);
  await pipeline(fs.createReadStream(file), hash);
  const digest = hash.digest('hex');
  return digest === etag ? undefined : `the ${algorithm} ${digest} instead of ${etag}`;
}

let lastShown = 0;
function showDownload(name: string, done: number, size?: number): void {
  const live = process.stderr.isTTY === true;
  if ((size ?? done) < 1e6 || (done !== size && (!live || performance.now() - lastShown < 100))) return;
  lastShown = performance.now();
  const mb = (bytes: number) => (bytes / 1e6).toFixed(1);
  const share = size ? ` of ${mb(size)} MB  ${Math.floor((100 * done) / size)} %` : ' MB';
  showLive(`${name}  ${mb(done)}${share}`, done === size);
}
