/**
 * Gives this project a TensorFlow that works: `npm run tensorflow -- [--gpu] [--version 2.21.0]`.
 *
 * @tensorflow/tfjs-node-gpu is a thin binding between Node and TensorFlow's C library, but its own installer brings
 * a library of 2022 from a host that refuses many people. This script takes today's library from Python's wheel,
 * compiles the binding against it with one g++ call, and puts it where Node looks:
 *
 *   CACHE/tensorflow-VERSION-cpu/library/          tensorflow/, beside nvidia/ with --gpu: there it looks for CUDA
 *   CACHE/tensorflow-VERSION-cpu/tfjs-node-gpu-V/  the npm package with the compiled binding
 *   node_modules/@tensorflow/tfjs-node-gpu/        a copy of that package; the big libraries stay in the cache
 *
 * CACHE is $NANO_TENSORFLOW_CACHE or ~/.cache/nano-param-decomp. It outlives `npm ci`: run this again after one, it
 * takes seconds. Each of the three folders is made beside its place and renamed: it is whole or not there.
 */
import { type SpawnOptions, spawn } from 'node:child_process';
import { once } from 'node:events';
import { existsSync, readdirSync, readFileSync, realpathSync, statfsSync, statSync } from 'node:fs';
import { cp, mkdir, readFile, rename, rm, writeFile } from 'node:fs/promises';
import { homedir } from 'node:os';
import { basename, dirname, join, resolve } from 'node:path';
import { parseArgs } from 'node:util';
import * as tf from '@tensorflow/tfjs';
import { loadTensorFlow } from '../engine/tensorflow.ts';

const PACKAGE = '@tensorflow/tfjs-node-gpu';
const BINDING = 'lib/napi-v8/tfjs_binding.node'; // where the package looks for it
const PROJECT = resolve(import.meta.dirname, '..');
const USAGE = `npm run tensorflow -- [options]
  --gpu              with CUDA's libraries: 3.4 GB to download; only NVIDIA's driver must be there already
  --version VERSION  of TensorFlow (default 2.21.0)
  --check            install nothing, only prove that TensorFlow works`;

class SetupError extends Error {
  exitCode = 1;
}

// ---- Pure parts ---------------------------------------------------------------------------------------------------

export function parseOptions(args: string[]) {
  const refuse = (message: string) => Object.assign(new SetupError(`${message}\n${USAGE}`), { exitCode: 2 });
  const flag = { type: 'boolean', default: false } as const;
  const version = { type: 'string', default: '2.21.0' } as const;
  try {
    const { values } = parseArgs({ args, options: { gpu: flag, check: flag, help: flag, version } });
    if (/^\d+\.\d+\.\d+(rc\d+)?$/.test(values.version)) return values;
  } catch (error) {
    throw refuse((error as Error).message.split('. ')[0]!);
  }
  throw refuse('--version takes a version such as 2.21.0');
}

export function cacheRoot(env: NodeJS.ProcessEnv): string {
  if (env.NANO_TENSORFLOW_CACHE) return resolve(env.NANO_TENSORFLOW_CACHE);
  return join(env.XDG_CACHE_HOME || join(homedir(), '.cache'), 'nano-param-decomp');
}

function glibcVersion(): string | undefined {
  const report = process.report.getReport() as unknown as { header: { glibcVersionRuntime?: string } };
  return report.header.glibcVersionRuntime;
}

/** The name of the wheel for this machine, or an error that says why there is none. */
export function wheelName(gpu: boolean, platform: string, arch: string, glibc: string | undefined): string {
  if (platform === 'linux' && glibc && arch === 'x64') return gpu ? 'tensorflow' : 'tensorflow-cpu';
  if (platform === 'linux' && glibc && arch === 'arm64' && !gpu) return 'tensorflow'; // there it has no CUDA inside
  const here = `${platform} ${arch}${platform === 'linux' && !glibc ? ' without glibc' : ''}`;
  const [what, needs] = gpu ? ['TensorFlow with CUDA', 'x86_64'] : ['TensorFlow', 'x86_64 or aarch64'];
  throw new SetupError(`no ${what} for ${here}: it takes Linux with glibc on ${needs}; other engines work`);
}

/** What the extra `and-cuda` of a TensorFlow wheel requires, in pip's words. */
export function cudaRequirements(metadata: string): string[] {
  const lines = metadata.matchAll(/^Requires-Dist: *([^;\n]+?) *;.*extra *== *["']and-cuda["']/gm);
  return [...lines].map(match => match[1]!);
}

// ---- Programs and folders -----------------------------------------------------------------------------------------

const interrupt = new AbortController();
const say = (line: string) => process.stderr.write(`${line}\n`);
const words = (text: string) => text.split(' ');
const remove = (folder: string) => rm(folder, { recursive: true, force: true, maxRetries: 5 });

/** Runs a program to its end and returns what it printed; its failure becomes one line. */
async function run(what: string, [program, ...args]: string[], options: SpawnOptions = {}): Promise<string> {
  interrupt.signal.throwIfAborted();
  // Its own process group: an interrupt reaches us alone, and we end the program together with its children.
  const child = spawn(program!, args, { ...options, stdio: ['ignore', 'pipe', 'pipe'], detached: true });
  const stop = () => {
    try {
      process.kill(-child.pid!);
    } catch {} // it has ended already
  };
  interrupt.signal.addEventListener('abort', stop);
  const texts = [child.stdout!, child.stderr!].map(stream => stream.setEncoding('utf8').toArray());
  const [code, signal] = await once(child, 'close');
  interrupt.signal.removeEventListener('abort', stop);
  interrupt.signal.throwIfAborted();
  const [output, errors] = (await Promise.all(texts)).map(chunks => chunks.join(''));
  if (code === 0) return output!;
  const lines = errors!.trim().split('\n');
  const telling = lines.find(line => /^(?!npm err\S* (code|errno|syscall|path)).*err(or)?\b/i.test(line));
  throw new SetupError(`${what} failed: ${telling || lines.at(-1) || signal || `exit code ${code}`}`);
}

/** Makes the folder `target`, whole or not at all. */
export async function publish(target: string, build: (folder: string) => Promise<unknown>): Promise<void> {
  const [parent, prefix] = [dirname(target), `${basename(target)}.partial-`];
  await mkdir(parent, { recursive: true });
  for (const name of readdirSync(parent).filter(name => name.startsWith(prefix)))
    if (!existsSync(`/proc/${name.slice(prefix.length)}`)) await remove(join(parent, name)); // its maker was killed
  const partial = join(parent, `${prefix}${process.pid}`);
  try {
    await mkdir(partial);
    await build(partial);
    interrupt.signal.throwIfAborted();
    await remove(target);
    await rename(partial, target);
  } finally {
    await remove(partial);
  }
}

function folderSize(folder: string): number {
  const files = readdirSync(folder, { recursive: true }).map(name => join(folder, String(name)));
  return files.reduce((sum, file) => sum + (statSync(file, { throwIfNoEntry: false })?.size ?? 0), 0);
}

type Tools = Awaited<ReturnType<typeof findTools>>;

/** The programs that an installation needs, or an error that names all that are missing. */
async function findTools() {
  const missing: string[] = [];
  const find = async (name: string, ...commands: string[]) => {
    for (const command of commands.map(words)) {
      const answer = await run(name, [...command, '--version']).catch(() => undefined);
      interrupt.signal.throwIfAborted();
      if (answer !== undefined) return command;
    }
    missing.push(name);
    return [];
  };
  const python = await find('Python 3', 'python3', 'python');
  const pip = await find('pip', 'python3 -m pip', 'python -m pip', 'pip3', 'pip');
  const tools = { python, pip, npm: await find('npm', 'npm'), gcc: await find('g++', 'g++') };
  if (missing.length === 0) return tools;
  const hint = 'Debian, Ubuntu: apt install python3-pip g++; Fedora: dnf install python3-pip gcc-c++';
  throw new SetupError(`missing here: ${missing.join(', ')} (${hint})`);
}

// ---- The three steps ----------------------------------------------------------------------------------------------

/** What is taken out of the wheels: libraries, the headers of the C interface, CUDA without its headers. */
const HEADERS = String.raw`tensorflow/include/(tensorflow|tsl|xla)/(.*/)?(c|eager|platform)/[^/]*\.h$`;
const KEEP = String.raw`tensorflow/lib[^/]*\.so|nvidia/(?!.*/include/)|${HEADERS}`;
// It prints the wheel's metadata. Python's own `extractall` would drop the mode that makes CUDA's ptxas executable.
const UNPACK = `
import os, re, sys, zipfile
folder, keep, wheel = sys.argv[1], sys.argv[2], zipfile.ZipFile(sys.argv[3])
for file in wheel.infolist():
    if file.filename.endswith('.dist-info/METADATA'):
        print(wheel.read(file).decode())
    if re.match(keep, file.filename) and not file.is_dir():
        os.chmod(wheel.extract(file, folder), file.external_attr >> 16 or 0o644)`;

/** Downloads the wheels (one that arrived is kept for the next try) and unpacks what is needed of them. */
async function installLibrary(target: string, requirement: string, gpu: boolean, tools: Tools) {
  const wheels = `${target}-wheels`;
  await mkdir(wheels, { recursive: true });
  const disk = statfsSync(wheels);
  const [needed, free] = [(gpu ? 9.5e9 : 1.3e9) - folderSize(wheels), disk.bavail * disk.bsize];
  const [need, have] = [needed, free].map(bytes => `${(bytes / 1e9).toFixed(1)} GB`);
  if (free < needed) throw new SetupError(`${wheels} needs ${need} of disk, but has ${have} free`);

  // Any CPython's wheel will do, since only its C library is used: so 3.12's, whatever Python is here.
  const arch = process.arch === 'x64' ? 'x86_64' : 'aarch64';
  const minor = Number(glibcVersion()!.split('.')[1]);
  const tags = Array.from({ length: minor - 4 }, (_, i) => `manylinux_2_${minor - i}_${arch}`);
  const platforms = [...tags, `manylinux2014_${arch}`].flatMap(tag => ['--platform', tag]);
  const wheel = [...words('--only-binary :all: --python-version 3.12 --implementation cp'), ...platforms];
  const options = words('download --no-deps --no-cache-dir --quiet --disable-pip-version-check');
  const download = async (requirement: string, folder: string) => {
    const show = (text: string) => process.stderr.isTTY && process.stderr.write(`\r${text}\x1b[K`);
    const timer = setInterval(() => show(`  ${(folderSize(folder) / 1e6).toFixed(0)} MB`), 500);
    const env = { ...process.env, TMPDIR: folder }; // /tmp may be small, and this one is cleaned up
    const command = [...tools.pip, ...options, ...wheel, '--dest', folder, requirement];
    await run('pip', command, { env }).finally(() => {
      clearInterval(timer);
      show('');
    });
  };

  await publish(target, async folder => {
    const add = async (requirement: string, note: string) => {
      const arrived = join(wheels, requirement.match(/^[\w.-]+/)![0]);
      say(`${existsSync(arrived) ? 'unpacking' : 'downloading'} ${requirement} (${note})`);
      if (!existsSync(arrived)) await publish(arrived, partial => download(requirement, partial));
      const file = join(arrived, readdirSync(arrived)[0]!);
      return run('unpacking', [...tools.python, '-c', UNPACK, folder, KEEP, file]);
    };
    const metadata = await add(requirement, gpu ? '570 MB, then 2.8 GB of CUDA' : '270 MB');
    const cuda = gpu ? cudaRequirements(metadata) : [];
    for (const [i, name] of cuda.entries()) await add(name, `${i + 1} of ${cuda.length}`);
    if (!existsSync(join(folder, 'tensorflow/libtensorflow_cc.so.2')))
      throw new SetupError(`the wheel ${requirement} has no libtensorflow_cc.so.2: try another --version`);
  });
  await remove(wheels);
}

/** Takes the package from npm without running its installer, and compiles its binding against the library. */
async function buildPackage(target: string, version: string, library: string, { python, npm, gcc }: Tools) {
  say(`building ${PACKAGE} ${version}`);
  await publish(target, async folder => {
    await run('npm pack', [...npm, 'pack', `${PACKAGE}@${version}`], { cwd: folder });
    await run('unpacking', [...python, '-m', 'tarfile', '-e', ...readdirSync(folder)], { cwd: folder });
    const cwd = join(folder, 'package');
    // Its dependencies go inside it, but not TFJS: the project's own copy must be found, never a second one.
    const original = await readFile(join(cwd, 'package.json'), 'utf8');
    const dependencies = { ...JSON.parse(original).dependencies, 'node-api-headers': '^1.9.0' };
    delete dependencies['@tensorflow/tfjs'];
    await writeFile(join(cwd, 'package.json'), JSON.stringify({ dependencies }));
    const options = words('--ignore-scripts --no-package-lock --no-audit --no-fund');
    await run('npm install', [...npm, 'install', ...options], { cwd });
    await writeFile(join(cwd, 'package.json'), original);

    await mkdir(join(cwd, dirname(BINDING)), { recursive: true });
    const flags = words(`-O2 -shared -fPIC -std=c++17 -DNAPI_VERSION=8 -o ${BINDING}`);
    const headers = ['-I.', '-Inode_modules/node-api-headers/include', `-I${library}/include`];
    const sources = ['binding/tfjs_backend.cc', 'binding/tfjs_binding.cc'];
    const libraries = [`-L${library}`, '-l:libtensorflow_cc.so.2', '-l:libtensorflow_framework.so.2'];
    const rpath = ['-Xlinker', '-rpath', '-Xlinker', library];
    await run('g++', [...gcc, ...flags, ...headers, ...sources, ...libraries, ...rpath], { cwd });
  });
}

/** Returns where it keeps the library. */
async function install(gpu: boolean, version: string): Promise<string> {
  const name = wheelName(gpu, process.platform, process.arch, glibcVersion());
  const manifest = JSON.parse(await readFile(join(PROJECT, 'package.json'), 'utf8'));
  const packageVersion: string = manifest.optionalDependencies[PACKAGE];

  const cache = join(cacheRoot(process.env), `tensorflow-${version}-${gpu ? 'gpu' : 'cpu'}`);
  const library = join(cache, 'library');
  const built = join(cache, `tfjs-node-gpu-${packageVersion}`);
  const binding = join(built, 'package', BINDING);
  const needsLibrary = !existsSync(library);
  const needsBinding = !existsSync(binding) || !readFileSync(binding).includes(library); // else the cache was moved
  if (needsLibrary || needsBinding) {
    const tools = await findTools();
    if (needsLibrary) await installLibrary(library, `${name}==${version}`, gpu, tools);
    if (needsBinding) await buildPackage(built, packageVersion, join(library, 'tensorflow'), tools);
  }
  await publish(join(PROJECT, 'node_modules', PACKAGE), folder =>
    cp(join(built, 'package'), folder, { recursive: true }),
  );
  return cache;
}

// ---- The proof, and the command line ------------------------------------------------------------------------------

/** A matrix product and a gradient on TensorFlow, through the same TFJS that the project uses. */
async function prove(): Promise<string> {
  const { version, gpu } = await loadTensorFlow();
  const a = tf.tensor2d([1, 2, 3, 4], [2, 2]);
  const b = tf.tensor2d([5, 6, 7, 8], [2, 2]);
  const product = String(a.matMul(b).arraySync());
  const derivative = tf.grad(x => tf.sum(tf.matMul(x, b)));
  const gradient = String(derivative(a).arraySync()); // each row: the row sums of b
  if (product !== '19,22,43,50' || gradient !== '11,15,11,15')
    throw new SetupError(`TensorFlow ${version} computes wrong: product ${product}, gradient ${gradient}`);
  return `TensorFlow ${version} works: matrix product and gradient are right, on the ${gpu ? 'GPU' : 'CPU'}`;
}

async function main(): Promise<void> {
  const { gpu, version, check, help } = parseOptions(process.argv.slice(2));
  if (help) return console.log(USAGE);
  if (check) return console.log(await prove());
  const cache = await install(gpu, version);
  const command = [process.execPath, ...process.execArgv, import.meta.filename, '--check'];
  const env = { ...process.env, TF_CPP_MIN_LOG_LEVEL: '3' };
  // in a process of its own: a bad library could end this one
  const proof = await run('the check', command, { env }).catch(error => {
    throw new SetupError(`${error.message} (if it stays, remove ${cache})`);
  });
  process.stdout.write(proof);
  if (gpu && proof.endsWith('CPU\n')) say('but TensorFlow sees no GPU here: does `nvidia-smi` list one?');
}

if (process.argv[1] && realpathSync(process.argv[1]) === import.meta.filename) {
  for (const signal of ['SIGINT', 'SIGTERM']) process.on(signal, () => interrupt.abort());
  await main().catch(error => {
    const { aborted } = interrupt.signal;
    say(`setup-tensorflow: ${aborted ? 'interrupted; what is whole is kept for the next try' : error.message}`);
    process.exitCode = aborted ? 130 : (error.exitCode ?? 1);
  });
}
