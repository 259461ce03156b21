/**
 * TFJS's WebAssembly backend, made fast enough to train on. Knows nothing of the method.
 *
 *   const { version, simd } = await loadWasm(); // the backend, from node_modules, no network
 *   fastWasmKernels(); //                          replaces its slow kernels, for the whole process
 *
 * The stock backend is quick where XNNPACK does the work (plain matrix products, + - * /, clip, sigmoid, softmax,
 * pooling) and 5 to 500 times slower than memory in many other places; each kernel below says why. They are
 * registered under the same names, so TFJS's ops and its own gradients use them as they are. A case that a
 * replacement does not cover (other dtypes, rare broadcasts, empty tensors) goes to the kernel it replaced.
 */
import { createRequire } from 'node:module';
import { dirname, sep } from 'node:path';
import * as tf from '@tensorflow/tfjs';
import type { BackendWasm } from '@tensorflow/tfjs-backend-wasm';

/** Loads the backend (SIMD where the machine has it, no threads under Node) and makes it the current one. */
export async function loadWasm(): Promise<{ version: string; simd: boolean }> {
  const events = ['uncaughtException', 'unhandledRejection'];
  const listeners = () => events.map(event => process.listeners(event as NodeJS.Signals));
  const before = listeners().flat();
  const wasm = await import('@tensorflow/tfjs-backend-wasm');
  // the .wasm files lie beside the package's main file
  const main = createRequire(import.meta.url).resolve('@tensorflow/tfjs-backend-wasm');
  wasm.setWasmPaths(dirname(main) + sep);
  if (!(await tf.setBackend('wasm'))) throw new Error('the WebAssembly backend does not start on this machine');
  // Emscripten's start-up code catches and rethrows every uncaught error of the process, so that Node prints its
  // 60 kB source line above our message: take its listeners off again.
  for (const [i, after] of listeners().entries())
    for (const listener of after) if (!before.includes(listener)) process.removeListener(events[i]!, listener);
  return { version: wasm.version_wasm, simd: Boolean(await tf.env().getAsync('WASM_HAS_SIMD_SUPPORT')) };
}

/** The backend with its fast kernels. */
export async function startWasm(): Promise<void> {
  await loadWasm();
  fastWasmKernels();
}

/** What is used of the compiled module besides TFJS's part of it. */
interface Emscripten {
  HEAPU8: Uint8Array;
  HEAP32: Int32Array;
  _malloc(bytes: number): number;
  _free(pointer: number): void;
  cwrap(name: string, returns: null, takes: 'number'[]): (...args: number[]) => void;
}

type Info = tf.TensorInfo;
type Inputs = Record<'x' | 'a' | 'b' | 'indices' | 'segmentIds', Info>;
interface Attrs {
  axis: number | number[];
  batchDims: number;
  begin: number[];
  dtype: tf.DataType;
  filterSize: number[];
  keepDims: boolean;
  numOrSizeSplits: number | number[];
  numSegments: number;
  pad: 'valid';
  perm: number[];
  reps: number[];
  size: number[];
  strides: number;
  transposeA: boolean;
  transposeB: boolean;
}
/** A kernel; `stock()` runs the one it replaces on the same arguments. */
type Kernel = (inputs: Inputs, attrs: Attrs, stock: () => Info | Info[]) => Info | Info[];

const sizeOf = (shape: number[]): number => tf.util.sizeFromShape(shape);
const isFloat = (...xs: Info[]) => xs.every(x => x.dtype === 'float32' && sizeOf(x.shape) > 0);
const isWide = (...xs: Info[]) => xs.every(x => x.dtype === 'float32' || x.dtype === 'int32'); // 4 bytes each

let installed = false;

/** Replaces the slow kernels. The wasm backend must be the current one. */
export function fastWasmKernels(): void {
  if (installed) return;
  if (tf.getBackend() !== 'wasm') throw new Error(`fastWasmKernels: the backend is ${tf.getBackend()}, not wasm`);
  installed = true;
  const backend = tf.backend() as BackendWasm;
  const wasm = backend.wasm as typeof backend.wasm & Emscripten;

  const stockOf = (name: string) => {
    const kernelFunc = tf.getKernel(name, 'wasm').kernelFunc as unknown as (args: object) => Info;
    return (inputs: Partial<Inputs>, attrs: Partial<Attrs> = {}) => kernelFunc({ inputs, attrs, backend });
  };
  const replace = (kernelName: string, kernel: Kernel): void => {
    const old = tf.getKernel(kernelName, 'wasm') as tf.KernelConfig | undefined;
    if (old) tf.unregisterKernel(kernelName, 'wasm');
    const kernelFunc: tf.KernelFunc = args =>
      kernel(args.inputs as Inputs, args.attrs as unknown as Attrs, () => old!.kernelFunc(args));
    tf.registerKernel({ ...old, kernelName, backendName: 'wasm', kernelFunc });
  };

  // Take views and addresses only after a kernel's last allocation: allocating may grow the heap, and that
  // detaches every view made before.
  const output = (shape: number[], dtype: tf.DataType = 'float32') => backend.makeOutput(shape, dtype);
  const address = (x: Info) => backend.getMemoryOffset(x.dataId);
  const values = (x: Info) => backend.typedArrayFromHeap(x);
  const drop = (x: Info) => backend.disposeData(x.dataId);
  /** x's data under another shape, for the time of a kernel */
  const view = (x: Info, shape: number[]): Info => ({ dataId: x.dataId, shape, dtype: x.dtype });

  // ---- Copies that need not be: the tape clones each tensor it saves, and gradients cast all they touch ----

  /** x's data as an output: one more reference to it is counted. */
  const alias = (x: Info): Info => {
    backend.incRef(x.dataId);
    return view(x, x.shape);
  };
  replace('Identity', ({ x }, _, stock) => (x.dtype === 'string' ? stock() : alias(x)));
  replace('Cast', ({ x }, { dtype }, stock) => (x.dtype === dtype ? alias(x) : stock()));

  // ---- Matrix products: a transposed operand or a batch goes through plain loops, 15 times slower ----

  const transpose = stockOf('Transpose');
  /** x [..., rows, cols] -> [..., cols, rows] */
  const swapped = (x: Info): Info => {
    const [rows, cols] = x.shape.slice(-2) as [number, number];
    const batch = x.shape.slice(0, -2);
    const n = sizeOf(batch);
    let out: Info;
    if (rows % 128) out = transpose({ x: view(x, [n, rows, cols]) }, { perm: [0, 2, 1] });
    else {
      // The stock kernel writes each input row to places that are a multiple of 512 bytes apart and so evict each
      // other from the cache (10 times slower). Instead: transpose blocks of 32 rows, then move their rows.
      const blocks = transpose({ x: view(x, [(n * rows) / 32, 32, cols]) }, { perm: [0, 2, 1] });
      out = transpose({ x: view(blocks, [n, rows / 32, cols, 32]) }, { perm: [0, 2, 1, 3] });
      drop(blocks);
    }
    out.shape = [...batch, cols, rows];
    return out;
  };
  replace('Transpose', ({ x }, { perm }, stock) => {
    const r = perm.length;
    const lastTwo = perm.every((p, i) => p === (i === r - 1 ? r - 2 : i === r - 2 ? r - 1 : i));
    return lastTwo && sizeOf(x.shape) > 0 ? swapped(x) : stock();
  });

  const matMul = stockOf('BatchMatMul');
  const matMulById = wasm.cwrap('BatchMatMul', null, Array(9).fill('number'));
  /** a [..., s, k] b [..., k, t]. XNNPACK serves single products only: a batch runs as many of them. */
  const product = (a: Info, b: Info): Info => {
    const [s, k, t] = [a.shape.at(-2)!, a.shape.at(-1)!, b.shape.at(-1)!];
    const batch = a.shape.slice(0, -2);
    const n = sizeOf(batch);
    if (n === 1) return matMul({ a, b }, { transposeA: false, transposeB: false });
    const out = output([...batch, s, t]);
    const shapes = wasm._malloc(24) >>> 0;
    wasm.HEAP32.set([1, s, k, 1, k, t], shapes >>> 2);
    const [A, B, C] = [-1, -2, -3]; // ids that the backend does not give: it counts up from 1
    for (let i = 0; i < n; i++) {
      wasm.tfjs.registerTensor(A, s * k, address(a) + 4 * i * s * k);
      wasm.tfjs.registerTensor(B, k * t, address(b) + 4 * i * k * t);
      wasm.tfjs.registerTensor(C, s * t, address(out) + 4 * i * s * t);
      matMulById(A, shapes, 3, B, shapes + 12, 3, 0, 0, C);
      for (const id of [A, B, C]) wasm.tfjs.disposeData(id); // with B goes XNNPACK's packed copy of it
    }
    wasm._free(shapes);
    return out;
  };
  replace('BatchMatMul', ({ a, b }, { transposeA, transposeB }, stock) => {
    if (!isFloat(a, b) || !tf.util.arraysEqual(a.shape.slice(0, -2), b.shape.slice(0, -2))) return stock();
    const passing: Info[] = [];
    const pass = (x: Info) => {
      passing.push(x);
      return x;
    };
    let out: Info;
    if (!transposeA) out = product(a, transposeB ? pass(swapped(b)) : b);
    else if (!transposeB && b.shape.at(-1)! <= a.shape.at(-1)!) out = product(pass(swapped(a)), b);
    // XNNPACK packs its right operand anew each time, so the smaller one belongs there: aᵀb = (bᵀa)ᵀ.
    // And aᵀbᵀ = (ba)ᵀ has one transpose instead of two.
    else out = swapped(pass(product(transposeB ? b : pass(swapped(b)), a)));
    passing.forEach(drop);
    return out;
  });

  // ---- Sums over leading axes: the stock kernels transpose first. XNNPACK's mean pooling needs not ----
  // And sums of everything: the stock kernels add in float32, one after another, which is off by 1e-3 at a million.

  const averagePool = stockOf('AvgPool');
  for (const name of ['Sum', 'Mean'])
    replace(name, ({ x }, { axis, keepDims }, stock) => {
      const axes = tf.util.parseAxisParam(axis, x.shape);
      const rest = x.shape.slice(axes.length);
      const [cols, rows] = [sizeOf(rest), sizeOf(x.shape) / sizeOf(rest)];
      if (isFloat(x) && rows > 1 && !rest.length) {
        const all = values(x);
        let sum = 0; // in double precision
        for (let i = 0; i < rows; i++) sum += all[i]!;
        const out = output(keepDims ? axes.map(() => 1) : []);
        values(out)[0] = name === 'Sum' ? sum : sum / rows;
        return out;
      }
      if (!isFloat(x) || rows === 1 || !rest.length || !axes.every((a, i) => a === i)) return stock();
      const image = view(x, [1, rows, 1, cols]);
      const out = averagePool({ x: image }, { filterSize: [rows, 1], strides: 1, pad: 'valid' });
      const means = values(out);
      if (name === 'Sum') for (let i = 0; i < cols; i++) means[i]! *= rows;
      out.shape = keepDims ? [...axes.map(() => 1), ...rest] : rest;
      return out;
    });

  // ---- Cutting and joining: the stock Slice copies its whole input first, and a split is many slices ----

  const place = (x: Info) => address(x) >>> 2;
  /** Copies `rows` runs of `width` 4-byte elements; places and steps are counted in elements. */
  const copyRows = (rows: number, width: number, from: number, step: number, to: number, toStep: number) => {
    const heap = wasm.HEAP32;
    for (let r = 0; r < rows; r++, from += step, to += toStep)
      if (width > 16) heap.copyWithin(to, from, from + width);
      else for (let i = 0; i < width; i++) heap[to + i] = heap[from + i]!;
  };
  /** x[..., begin : begin + size, ...] on one axis */
  const piece = (x: Info, axis: number, begin: number, size: number): Info => {
    const [outer, inner] = [sizeOf(x.shape.slice(0, axis)), sizeOf(x.shape.slice(axis + 1))];
    const out = output(x.shape.with(axis, size), x.dtype);
    const [from, step, width] = [place(x) + begin * inner, x.shape[axis]! * inner, size * inner];
    copyRows(outer, width, from, step, place(out), width);
    return out;
  };
  replace('Slice', ({ x }, { begin, size }, stock) => {
    const [from = [], sizes = []] = tf.slice_util.parseSliceParams(x as tf.Tensor, begin, size);
    const cut = sizes.flatMap((s, axis) => (s === x.shape[axis] ? [] : [axis]));
    if (!isWide(x) || cut.length > 1) return stock();
    return cut.length ? piece(x, cut[0]!, from[cut[0]!]!, sizes[cut[0]!]!) : alias(x);
  });
  replace('SplitV', ({ x }, attrs, stock) => {
    if (!isWide(x)) return stock();
    const axis = tf.util.parseAxisParam(attrs.axis, x.shape)[0]!;
    const sizes = tf.backend_util.prepareSplitSize(x as tf.Tensor, attrs.numOrSizeSplits, axis);
    return sizes.map((size, i) => piece(x, axis, tf.util.sum(sizes.slice(0, i)), size));
  });
  // the stock kernel makes a typed-array view for each row of each input
  replace('Concat', (inputs, attrs, stock) => {
    const xs = Object.values(inputs);
    if (!isWide(...xs)) return stock();
    const shapes = xs.map(x => x.shape);
    const axis = tf.util.parseAxisParam(attrs.axis, shapes[0]!)[0]!;
    tf.backend_util.assertParamsConsistent(shapes, axis);
    const out = output(tf.backend_util.computeOutShape(shapes, axis), xs[0]!.dtype);
    const [outer, stride] = [sizeOf(out.shape.slice(0, axis)), sizeOf(out.shape.slice(axis))];
    let to = place(out);
    for (const x of xs) {
      const width = sizeOf(x.shape.slice(axis));
      copyRows(outer, width, place(x), width, to, stride);
      to += width;
    }
    return out;
  });

  // ---- Repeating and picking ----

  // the stock kernel finds each element's source by divisions, 40 ns each; tf.where and tf.broadcastTo tile
  replace('Tile', ({ x }, { reps }, stock) => {
    if (x.dtype === 'string' || sizeOf(x.shape) === 0 || reps.includes(0)) return stock();
    let out = alias(x);
    for (const [axis, times] of reps.entries()) {
      if (times === 1) continue;
      const once = out;
      out = output(once.shape.with(axis, once.shape[axis]! * times), x.dtype);
      const [from, to, width] = [values(once), values(out), sizeOf(once.shape.slice(axis))];
      for (let i = 0, o = 0; i < from.length; i += width, o += width * times)
        if (width === 1) to.fill(from[i]!, o, o + times);
        else for (let r = 0; r < times; r++) to.set(from.subarray(i, i + width), o + r * width);
      drop(once);
    }
    return out;
  });
  replace('GatherV2', ({ x, indices }, attrs, stock) => {
    const axis = tf.util.parseAxisParam(attrs.axis, x.shape)[0]!;
    const [outer, length, inner] = [x.shape.slice(0, axis), x.shape[axis]!, x.shape.slice(axis + 1)];
    const outside = (i: number) => i < 0 || i >= length; // the stock kernel throws the error
    if (!isWide(x, indices) || attrs.batchDims || values(indices).some(outside)) return stock();
    const out = output([...outer, ...indices.shape, ...inner], x.dtype);
    const [picks, width, rows] = [values(indices), sizeOf(inner), sizeOf(outer)];
    const [from, to, step, toStep] = [place(x), place(out), length * width, picks.length * width];
    for (const [i, pick] of picks.entries()) copyRows(rows, width, from + pick * width, step, to + i * width, toStep);
    return out;
  });
  // not in the stock backend at all; tf.gather's gradient needs it
  replace('UnsortedSegmentSum', ({ x, segmentIds }, { numSegments }) => {
    const inner = x.shape.slice(segmentIds.shape.length);
    const out = output([numSegments, ...inner], x.dtype);
    const [from, ids, to, width] = [values(x), values(segmentIds), values(out).fill(0), sizeOf(inner)];
    for (const [i, id] of ids.entries())
      if (id >= 0 && id < numSegments) for (let j = 0; j < width; j++) to[id * width + j]! += from[i * width + j]!;
    return out;
  });

  // the stock kernel calls everything between ±1.2e-7 zero, which would stop an adversary where gradients are small
  replace('Sign', ({ x }, _, stock) => {
    if (!isFloat(x)) return stock();
    const out = output(x.shape);
    values(out).set(values(x).map(Math.sign));
    return out;
  });
}
