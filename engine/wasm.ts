/**
 * TFJS's WebAssembly backend, made fast enough to train on. Knows nothing of the method.
 *
 *   const { version, simd } = await loadWasm(); // the backend, from node_modules, no network
 *   fastWasmKernels(); //                          replaces the slow kernels, for the whole process
 *
 * The stock backend is quick where XNNPACK does the work (plain matrix products, + - * /, clip, sigmoid, softmax)
 * and 5 to 500 times slower than memory in many other places; each kernel below says why. They are registered
 * under the same names, so TFJS's ops and its own gradients use them as they are. A case that a replacement does
 * not cover (other dtypes, rare broadcasts, empty tensors) goes to the kernel it replaced.
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
  if (!(await tf.setBackend('wasm')))
    throw new Error('the WebAssembly backend does not start on this machine');
  // Emscripten's start-up code catches and rethrows every uncaught error of the process, so that Node prints its
  // 60 kB source line above our message: take its listeners off again.
  for (const [i, after] of listeners().entries())
    for (const listener of after)
      if (!before.includes(listener)) process.removeListener(events[i]!, listener);
  return { version: wasm.version_wasm, simd: Boolean(await tf.env().getAsync('WASM_HAS_SIMD_SUPPORT')) };
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
type Inputs = Record<'x' | 'a' | 'b' | 'condition' | 't' | 'e' | 'indices' | 'segmentIds', Info>;
interface Attrs {
  axis: number | number[];
  begin: number[];
  size: number | number[];
  batchDims: number;
  dtype: tf.DataType;
  keepDims: boolean;
  numOrSizeSplits: number | number[];
  numSegments: number;
  perm: number[];
  reps: number[];
  transposeA: boolean;
  transposeB: boolean;
}
/** A kernel; `stock()` runs the one it replaces on the same arguments. */
type Kernel = (inputs: Inputs, attrs: Attrs, stock: () => Info | Info[]) => Info | Info[];

const sizeOf = (shape: number[]): number => tf.util.sizeFromShape(shape);
const sameShape = (a: Info, b: Info): boolean => tf.util.arraysEqual(a.shape, b.shape);
const isFloat = (...xs: Info[]) => xs.every(x => x.dtype === 'float32' && sizeOf(x.shape) > 0);
const isWide = (...xs: Info[]) => xs.every(x => x.dtype === 'float32' || x.dtype === 'int32'); // 4 bytes each

let installed = false;

/** Replaces the slow kernels. The wasm backend must be the current one. */
export function fastWasmKernels(): void {
  if (installed) return;
  if (tf.getBackend() !== 'wasm')
    throw new Error(`fastWasmKernels: the backend is ${tf.getBackend()}, not wasm`);
  installed = true;
  const backend = tf.backend() as BackendWasm;
  const wasm = backend.wasm as typeof backend.wasm & Emscripten;

  const stockOf = (name: string) => {
    const kernelFunc = tf.getKernel(name, 'wasm').kernelFunc as unknown as (args: object) => Info;
    return (inputs: Partial<Inputs>, attrs: Partial<Attrs>) => kernelFunc({ inputs, attrs, backend });
  };
  const replace = (name: string, kernel: Kernel): void => {
    const old = tf.getKernel(name, 'wasm') as tf.KernelConfig | undefined;
    if (old) tf.unregisterKernel(name, 'wasm');
    const kernelFunc: tf.KernelFunc = args =>
      kernel(args.inputs as Inputs, args.attrs as unknown as Attrs, () => old!.kernelFunc(args));
    tf.registerKernel({ ...old, kernelName: name, backendName: 'wasm', kernelFunc });
  };

  // Take views and addresses only after the kernel's last allocation: allocating may grow the heap, and that
  // detaches every view made before.
  const output = (shape: number[], dtype: tf.DataType = 'float32') => backend.makeOutput(shape, dtype);
  const address = (x: Info) => backend.getMemoryOffset(x.dataId);
  const floats = (x: Info) => new Float32Array(wasm.HEAPU8.buffer, address(x), sizeOf(x.shape));
  const ints = (x: Info) => new Int32Array(wasm.HEAPU8.buffer, address(x), sizeOf(x.shape));
  const bools = (x: Info) => new Uint8Array(wasm.HEAPU8.buffer, address(x), sizeOf(x.shape));
  const drop = (x: Info) => backend.disposeData(x.dataId);
  /** The same data, perhaps under another shape: copies nothing, counts one more reference. */
  const alias = (x: Info, shape = x.shape): Info => {
    backend.incRef(x.dataId);
    return { dataId: x.dataId, shape, dtype: x.dtype };
  };

  // ---- Copies that need not be: the tape clones each tensor it saves, and gradients cast all they touch ----

  replace('Identity', ({ x }, _, stock) => (x.dtype === 'string' ? stock() : alias(x)));
  replace('Cast', ({ x }, { dtype }, stock) => (x.dtype === dtype ? alias(x) : stock()));

  // ---- Transposes and matrix products ----

  const transpose = stockOf('Transpose');
  /** x [..., rows, cols] -> [..., cols, rows] */
  const swapped = (x: Info): Info => {
    const [rows, cols] = x.shape.slice(-2) as [number, number];
    const batch = x.shape.slice(0, -2);
    const n = sizeOf(batch);
    let out: Info;
    if (rows % 128) out = transpose({ x: { ...x, shape: [n, rows, cols] } }, { perm: [0, 2, 1] });
    else {
      // The stock kernel writes one input row to places that are a multiple of 512 bytes apart, which evict each
      // other from the cache (10 times slower). So: transpose blocks of 32 rows, then move whole block rows.
      const blocks = transpose({ x: { ...x, shape: [(n * rows) / 32, 32, cols] } }, { perm: [0, 2, 1] });
      out = transpose({ x: { ...blocks, shape: [n, rows / 32, cols, 32] } }, { perm: [0, 2, 1, 3] });
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
    const [A, B, C] = [-1, -2, -3]; // ids the backend does not give: it counts up from 1
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
  // Products with a transposed operand run a plain loop, 15 times slower than XNNPACK: transpose first.
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

  // ---- Sums: over leading axes the stock kernel transposes first ----

  replace('Sum', ({ x }, { axis, keepDims }, stock) => {
    const axes = tf.util.parseAxisParam(axis, x.shape);
    const count = axes.length;
    if (!isFloat(x) || count === x.shape.length || !axes.every((a, i) => a === i)) return stock();
    const rest = x.shape.slice(count);
    const out = output(keepDims ? [...axes.map(() => 1), ...rest] : rest);
    const [from, cols] = [floats(x), sizeOf(rest)];
    const sums = new Float64Array(cols);
    let i = 0;
    for (
      ;
      i + 4 * cols <= from.length;
      i += 4 * cols // four rows at a time: fewer trips to `sums`
    )
      for (let j = 0, k = i; j < cols; j++, k++)
        sums[j]! += from[k]! + from[k + cols]! + from[k + 2 * cols]! + from[k + 3 * cols]!;
    for (let j = 0; i < from.length; i++, j = (j + 1) % cols) sums[j]! += from[i]!;
    floats(out).set(sums);
    return out;
  });

  // ---- Cutting and joining: the stock Slice copies the whole input first, once for each piece of a split ----

  /** Copies `rows` runs of `width` 4-byte elements; addresses and strides are counted in elements. */
  const copyRows = (
    rows: number,
    width: number,
    from: number,
    fromStride: number,
    to: number,
    toStride: number,
  ) => {
    const heap = wasm.HEAP32;
    for (let r = 0; r < rows; r++, from += fromStride, to += toStride)
      if (width > 16) heap.copyWithin(to, from, from + width);
      else for (let i = 0; i < width; i++) heap[to + i] = heap[from + i]!;
  };
  /** x[..., begin : begin + size, ...] on one axis */
  const piece = (x: Info, axis: number, begin: number, size: number): Info => {
    const inner = sizeOf(x.shape.slice(axis + 1));
    const out = output(x.shape.with(axis, size), x.dtype);
    const stride = x.shape[axis]! * inner;
    const from = (address(x) >>> 2) + begin * inner;
    copyRows(sizeOf(x.shape.slice(0, axis)), size * inner, from, stride, address(out) >>> 2, size * inner);
    return out;
  };
  replace('Slice', ({ x }, attrs, stock) => {
    const [begin, size] = tf.slice_util.parseSliceParams(x as tf.Tensor, attrs.begin, attrs.size);
    const cut = size.flatMap((s, axis) => (s === x.shape[axis] ? [] : [axis]));
    if (!isWide(x) || cut.length > 1) return stock();
    return cut.length ? piece(x, cut[0]!, begin[cut[0]!]!, size[cut[0]!]!) : alias(x);
  });
  replace('SplitV', ({ x }, attrs, stock) => {
    if (!isWide(x)) return stock();
    const axis = tf.util.parseAxisParam(attrs.axis, x.shape)[0]!;
    let end = 0;
    return tf.backend_util
      .prepareSplitSize(x as tf.Tensor, attrs.numOrSizeSplits, axis)
      .map(size => piece(x, axis, (end += size) - size, size));
  });
  // One typed-array view for each row and input; copyWithin on the heap needs none.
  replace('Concat', (inputs, attrs, stock) => {
    const xs = Object.values(inputs);
    if (!isWide(...xs)) return stock();
    const axis = tf.util.parseAxisParam(attrs.axis, xs[0]!.shape)[0]!;
    const shapes = xs.map(x => x.shape);
    tf.backend_util.assertParamsConsistent(shapes, axis);
    const out = output(tf.backend_util.computeOutShape(shapes, axis), xs[0]!.dtype);
    const stride = sizeOf(out.shape.slice(axis));
    let to = address(out) >>> 2;
    for (const x of xs) {
      const width = sizeOf(x.shape.slice(axis));
      copyRows(sizeOf(x.shape.slice(0, axis)), width, address(x) >>> 2, width, to, stride);
      to += width;
    }
    return out;
  });

  // ---- Repeating and picking rows ----

  // The stock kernel finds the source of every element by divisions: 40 ns each. tf.where and tf.broadcastTo use it.
  replace('Tile', ({ x }, { reps }, stock) => {
    if (x.dtype === 'string' || sizeOf(x.shape) === 0 || reps.includes(0)) return stock();
    let out = alias(x);
    for (const [axis, times] of reps.entries()) {
      if (times === 1) continue;
      const whole = out;
      out = output(whole.shape.with(axis, whole.shape[axis]! * times), x.dtype);
      const width = sizeOf(whole.shape.slice(axis));
      const [from, to] = [backend.typedArrayFromHeap(whole), backend.typedArrayFromHeap(out)];
      for (let i = 0, o = 0; i < from.length; i += width, o += width * times)
        if (width === 1) to.fill(from[i]!, o, o + times);
        else for (let r = 0; r < times; r++) to.set(from.subarray(i, i + width), o + r * width);
      drop(whole);
    }
    return out;
  });
  replace('GatherV2', ({ x, indices }, attrs, stock) => {
    if (!isWide(x, indices) || attrs.batchDims) return stock();
    const axis = tf.util.parseAxisParam(attrs.axis, x.shape)[0]!;
    const [length, inner] = [x.shape[axis]!, sizeOf(x.shape.slice(axis + 1))];
    if (ints(indices).some(i => i < 0 || i >= length)) return stock(); // it throws the error
    const out = output([...x.shape.slice(0, axis), ...indices.shape, ...x.shape.slice(axis + 1)], x.dtype);
    const [outer, picked] = [sizeOf(x.shape.slice(0, axis)), ints(indices)];
    for (let p = 0; p < picked.length; p++) {
      const [from, to] = [(address(x) >>> 2) + picked[p]! * inner, (address(out) >>> 2) + p * inner];
      copyRows(outer, inner, from, length * inner, to, picked.length * inner);
    }
    return out;
  });
  // Missing in the wasm backend; tf.gather's gradient needs it.
  replace('UnsortedSegmentSum', ({ x, segmentIds }, { numSegments }) => {
    const inner = x.shape.slice(segmentIds.shape.length);
    const out = output([numSegments, ...inner], x.dtype);
    const width = sizeOf(inner);
    const [from, ids, to] = [
      backend.typedArrayFromHeap(x),
      ints(segmentIds),
      backend.typedArrayFromHeap(out),
    ];
    to.fill(0);
    for (let i = 0; i < ids.length; i++)
      if (ids[i]! >= 0 && ids[i]! < numSegments)
        for (let j = 0; j < width; j++) to[ids[i]! * width + j]! += from[i * width + j]!;
    return out;
  });

  // ---- Comparisons and choices: stock ones take an indirect call for each element, and branch on the data ----

  type CompareLoop = (a: Float32Array, b: Float32Array, out: Uint8Array, am: number, bm: number) => void;
  /** The masks am, bm are -1, or 0 for a single value that is compared with all: a[i & am]. */
  const compare = (name: string, loop: CompareLoop) =>
    replace(name, ({ a, b }, _, stock) => {
      const single = (x: Info) => sizeOf(x.shape) === 1;
      if (!isFloat(a, b) || !(sameShape(a, b) || single(a) || single(b))) return stock();
      const out = output(tf.broadcast_util.assertAndGetBroadcastShape(a.shape, b.shape), 'bool');
      loop(floats(a), floats(b), bools(out), single(a) ? 0 : -1, single(b) ? 0 : -1);
      return out;
    });
  const greater: CompareLoop = (a, b, out, am, bm) => {
    for (let i = 0; i < out.length; i++) out[i] = +(a[i & am]! > b[i & bm]!);
  };
  const greaterEqual: CompareLoop = (a, b, out, am, bm) => {
    for (let i = 0; i < out.length; i++) out[i] = +(a[i & am]! >= b[i & bm]!);
  };
  compare('Greater', greater);
  compare('GreaterEqual', greaterEqual);
  compare('Less', (a, b, out, am, bm) => greater(b, a, out, bm, am));
  compare('LessEqual', (a, b, out, am, bm) => greaterEqual(b, a, out, bm, am));
  replace('LogicalAnd', ({ a, b }, _, stock) => {
    if (!sameShape(a, b)) return stock();
    const result = output(a.shape, 'bool');
    const [p, q, out] = [bools(a), bools(b), bools(result)];
    for (let i = 0; i < out.length; i++) out[i] = p[i]! & q[i]!;
    return result;
  });
  replace('Select', ({ condition, t, e }, _, stock) => {
    if (!isWide(t, e) || !sameShape(condition, t)) return stock();
    const result = output(t.shape, t.dtype);
    const [c, p, q, out] = [bools(condition), ints(t), ints(e), ints(result)];
    for (let i = 0; i < out.length; i++) out[i] = (p[i]! & -c[i]!) | (q[i]! & (c[i]! - 1)); // by bits: no branch
    return result;
  });

  // ---- Elementary functions: stock ones call the C library for each element ----

  const unary = (name: string, loop: (x: Float32Array, out: Float32Array) => void) =>
    replace(name, ({ x }, _, stock) => {
      if (!isFloat(x)) return stock();
      const out = output(x.shape);
      loop(floats(x), floats(out));
      return out;
    });
  unary('Exp', (x, out) => {
    for (let i = 0; i < out.length; i++) out[i] = exp(x[i]!);
  });
  unary('Tanh', (x, out) => {
    for (let i = 0; i < out.length; i++) {
      const e = exp(2 * Math.min(x[i]!, 20));
      out[i] = (e - 1) / (e + 1);
    }
  });
  // Abramowitz and Stegun 7.1.26, as in the stock kernel: within 1.5e-7
  unary('Erf', (x, out) => {
    for (let i = 0; i < out.length; i++) {
      const z = Math.abs(x[i]!);
      const t = 1 / (1 + 0.3275911 * z);
      const p =
        t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))));
      out[i] = Math.sign(x[i]!) * (1 - p * exp(-z * z));
    }
  });
  replace('Pow', ({ a, b }, _, stock) => {
    if (!isFloat(a, b) || sizeOf(b.shape) > 1 || b.shape.length > a.shape.length) return stock();
    const result = output(a.shape);
    const [x, bits, out, p] = [floats(a), ints(a), floats(result), floats(b)[0]!];
    for (let i = 0; i < out.length; i++) {
      const ordinary = bits[i]! >= 0x00800000 && bits[i]! < 0x7f800000; // positive, normal, finite
      out[i] = ordinary ? exp(p * log(bits[i]!)) : x[i]! ** p;
    }
    return result;
  });
}

const ROOTS = Float64Array.from({ length: 256 }, (_, i) => 2 ** (i / 256));
const POWERS = Float64Array.from({ length: 320 }, (_, i) => 2 ** (i - 160));
/** eˣ to 1e-12 for |x| < 88, then 0 or infinity as a float32: e^x = 2^k 2^(j/256) e^r with |r| < 0.0014. */
function exp(x: number): number {
  const y = x < -104 ? -104 : x > 89 ? 89 : x; // NaN stays
  const n = (y * (256 / Math.LN2) + 40960.5) | 0; // rounded, and shifted to be positive
  const r = y - (n - 40960) * (Math.LN2 / 256);
  return POWERS[n >> 8]! * ROOTS[n & 255]! * (1 + r * (1 + r * (1 / 2 + r * (1 / 6))));
}

const MIDDLES = Float64Array.from({ length: 256 }, (_, i) => 1 + (i + 0.5) / 256);
const INVERSES = MIDDLES.map(m => 1 / m);
const LOGS = MIDDLES.map(Math.log);
/** ln of a positive normal float32, given its bits: ln(2^e m) = e ln 2 + ln(middle) + ln(1 + r), |r| < 0.002. */
function log(bits: number): number {
  const j = (bits >> 15) & 255;
  const r = (1 + (bits & 0x7fffff) * 2 ** -23) * INVERSES[j]! - 1;
  return ((bits >> 23) - 127) * Math.LN2 + LOGS[j]! + r * (1 - r * (1 / 2 - r * (1 / 3 - r / 4)));
}
