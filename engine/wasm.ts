/**
 * TFJS's WebAssembly backend, made fast enough to train on. Knows nothing of the method.
 *
 *   const { version, simd } = await loadWasm(); // the backend, from node_modules, no network
 *   fastWasmKernels(); //                          replaces its slow kernels, for the whole process
 *
 * The stock backend is quick where XNNPACK does the work (plain matrix products, + - * /, clip, sigmoid, softmax)
 * and 5 to 500 times slower than memory in many other places; each kernel below says why. They are registered
 * under the same names, so TFJS's ops and its own gradients use them as they are. A case that a replacement does
 * not cover (other dtypes, rare broadcasts, empty tensors) goes to the kernel it replaced.
 *
 *   A. Loading   B. Copies   C. Matrix products   D. Sums   E. Cutting and joining   F. Repeating and picking
 *   G. Elementwise formulas, compiled to SIMD
 */
import { createRequire } from 'node:module';
import { dirname, sep } from 'node:path';
import * as tf from '@tensorflow/tfjs';
import type { BackendWasm } from '@tensorflow/tfjs-backend-wasm';

// ---- A. Loading ----

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
  asm: { memory: object };
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
  keepDims: boolean;
  numOrSizeSplits: number | number[];
  numSegments: number;
  perm: number[];
  reps: number[];
  size: number[];
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
  if (tf.getBackend() !== 'wasm')
    throw new Error(`fastWasmKernels: the backend is ${tf.getBackend()}, not wasm`);
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

  // ---- B. Copies that need not be: the tape clones each tensor it saves, and gradients cast all they touch ----

  /** The same data once more: one more reference to it is counted. */
  const alias = (x: Info): Info => {
    backend.incRef(x.dataId);
    return { dataId: x.dataId, shape: x.shape, dtype: x.dtype };
  };
  replace('Identity', ({ x }, _, stock) => (x.dtype === 'string' ? stock() : alias(x)));
  replace('Cast', ({ x }, { dtype }, stock) => (x.dtype === dtype ? alias(x) : stock()));

  // ---- C. Matrix products: a transposed operand or a batch goes through plain loops, 15 times slower ----

  const transpose = stockOf('Transpose');
  /** x [..., rows, cols] -> [..., cols, rows] */
  const swapped = (x: Info): Info => {
    const [rows, cols] = x.shape.slice(-2) as [number, number];
    const batch = x.shape.slice(0, -2);
    const n = sizeOf(batch);
    let out: Info;
    if (rows % 128) out = transpose({ x: { ...x, shape: [n, rows, cols] } }, { perm: [0, 2, 1] });
    else {
      // The stock kernel writes each input row to places that are a multiple of 512 bytes apart and so evict each
      // other from the cache (10 times slower). Instead: transpose blocks of 32 rows, then move their rows.
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

  // ---- D. Sums: over leading axes the stock kernel transposes first ----

  replace('Sum', ({ x }, { axis, keepDims }, stock) => {
    const axes = tf.util.parseAxisParam(axis, x.shape);
    if (!isFloat(x) || axes.length === x.shape.length || !axes.every((a, i) => a === i)) return stock();
    const rest = x.shape.slice(axes.length);
    const out = output(keepDims ? [...axes.map(() => 1), ...rest] : rest);
    const [from, cols] = [values(x), sizeOf(rest)];
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
    values(out).set(sums);
    return out;
  });

  // ---- E. Cutting and joining: the stock Slice copies its whole input first, and a split is many slices ----

  /** Copies `rows` runs of `width` 4-byte elements; places and strides are counted in elements. */
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
  const place = (x: Info) => address(x) >>> 2;
  /** x[..., begin : begin + size, ...] on one axis */
  const piece = (x: Info, axis: number, begin: number, size: number): Info => {
    const inner = sizeOf(x.shape.slice(axis + 1));
    const out = output(x.shape.with(axis, size), x.dtype);
    const outer = sizeOf(x.shape.slice(0, axis));
    copyRows(outer, size * inner, place(x) + begin * inner, x.shape[axis]! * inner, place(out), size * inner);
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

  // ---- F. Repeating and picking ----

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
    if (!isWide(x, indices) || attrs.batchDims || values(indices).some(i => i < 0 || i >= length))
      return stock();
    const out = output([...outer, ...indices.shape, ...inner], x.dtype);
    const [picks, rows, width] = [values(indices), sizeOf(outer), sizeOf(inner)];
    for (const [i, pick] of picks.entries())
      copyRows(
        rows,
        width,
        place(x) + pick * width,
        length * width,
        place(out) + i * width,
        picks.length * width,
      );
    return out;
  });
  // not in the stock backend at all; tf.gather's gradient needs it
  replace('UnsortedSegmentSum', ({ x, segmentIds }, { numSegments }) => {
    const inner = x.shape.slice(segmentIds.shape.length);
    const out = output([numSegments, ...inner], x.dtype);
    const [from, ids, to, width] = [values(x), values(segmentIds), values(out).fill(0), sizeOf(inner)];
    for (const [i, id] of ids.entries())
      if (id >= 0 && id < numSegments)
        for (let j = 0; j < width; j++) to[id * width + j]! += from[i * width + j]!;
    return out;
  });

  // ---- G. Elementwise formulas: the stock kernels call a function for each element, 3 to 14 ns each ----

  const compiled = compile(wasm.asm.memory);
  const copies = wasm._malloc(32) >>> 0; // for single values that meet whole tensors: four copies of each
  for (const [name, { takes, gives }] of Object.entries(FORMULAS))
    replace(name, (inputs, _, stock) => {
      const xs = Object.values(inputs);
      const shape = xs.map(x => x.shape).reduce(tf.broadcast_util.assertAndGetBroadcastShape);
      const n = sizeOf(shape);
      const isSingle = (x: Info) => x.dtype === 'float32' && sizeOf(x.shape) === 1;
      const fits = xs.every((x, i) => x.dtype === takes[i] && (sizeOf(x.shape) === n || isSingle(x)));
      if (n < 4 || !fits) return stock();
      if (name === 'Pow' && Number.isInteger(values(xs[1]!)[0])) return stock(); // it has powers of negative numbers
      const out = output(shape, gives);
      const operands = [out, ...xs].map((x, i) => {
        const lane = sizeOf(x.shape) < n ? 0 : x.dtype === 'bool' ? 1 : 4; // bytes from one element to the next
        const start = lane ? address(x) : copies + 16 * (i - 1);
        if (!lane) wasm.HEAP32.fill(wasm.HEAP32[place(x)]!, start >>> 2, (start >>> 2) + 4);
        return { start, lane };
      });
      const run = (from: number, vectors: number) =>
        compiled[name]!(
          vectors,
          ...operands.map(o => o.start + from * o.lane),
          ...operands.map(o => 4 * o.lane),
        );
      run(0, n >> 2);
      if (n % 4) run(n - 4, 1); // the last few elements, with their neighbours once more
      return out;
    });
}

/** The instructions that leave one vector of four lanes on the stack. */
type Code = number[];
interface Formula {
  takes: tf.DataType[];
  gives: tf.DataType;
  code: (...inputs: Code[]) => Code;
}
const unary = (code: (x: Code) => Code): Formula => ({ takes: ['float32'], gives: 'float32', code });
const binary = (code: (a: Code, b: Code) => Code, gives: tf.DataType = 'float32'): Formula => ({
  takes: ['float32', 'float32'],
  gives,
  code: code as Formula['code'],
});

/** A number that is not negative, seven bits to a byte. */
const leb = (n: number): Code => (n < 64 ? [n] : [(n & 127) | 128, ...leb(n >>> 7)]);
const op =
  (opcode: number) =>
  (...operands: Code[]): Code => [...operands.flat(), 0xfd, ...leb(opcode)];
const [add, sub, mul, div, sqrt, abs] = [op(0xe4), op(0xe5), op(0xe6), op(0xe7), op(0xe3), op(0xe0)];
const [max, min, pmin, pmax] = [op(0xe9), op(0xe8), op(0xea), op(0xeb)]; // pmin(x, c), pmax(x, c) leave NaN as it is
const [equal, less, greater, lessEqual, greaterEqual] = [op(0x41), op(0x43), op(0x44), op(0x45), op(0x46)];
const [and, or, not, choose] = [op(0x4e), op(0x50), op(0x4d), op(0x52)]; // choose(yes, no, mask)
const [toFloat, addBits, subBits] = [op(0xfa), op(0xae), op(0xb1)];
const shiftLeft = (x: Code, by: number) => op(0xab)(x, [0x41, by]);
const shiftRight = (x: Code, by: number) => op(0xac)(x, [0x41, by]);
const bits = (n: number): Code => [0x41, ...leb(n), 0xfd, 0x11];
const num = (x: number): Code => [0x43, ...new Uint8Array(new Float32Array([x]).buffer), 0xfd, 0x13];

let locals = 0; // of the function being compiled
/** let v = value in body(v) */
const using = (value: Code, body: (v: Code) => Code): Code => {
  const v = leb(locals++);
  return [...value, 0x21, ...v, ...body([0x20, ...v])];
};
/** c₀ + c₁x + c₂x² + ... */
const polynomial = (x: Code, cs: number[]): Code =>
  cs.slice(0, -1).reduceRight((sum, c) => add(num(c), mul(x, sum)), num(cs.at(-1)!));

/** eˣ = 2ⁿ eʳ with n = round(x / ln 2), |r| < 0.35; ln 2 in two parts, so that n ln 2 is exact. 0 below e⁻⁸⁷. */
const exp = (x: Code): Code =>
  using(pmax(pmin(x, num(89)), num(-88)), y =>
    // adding 1.5 2²³ leaves n in the lowest bits; from there it goes into the exponent
    using(add(mul(y, num(Math.LOG2E)), num(1.5 * 2 ** 23)), shifted =>
      using(sub(shifted, num(1.5 * 2 ** 23)), n =>
        using(sub(sub(y, mul(n, num(0.693359375))), mul(n, num(Math.LN2 - 0.693359375))), r =>
          mul(
            polynomial(r, [1, 1, 1 / 2, 1 / 6, 1 / 24, 1 / 120, 1 / 720]),
            addBits(shiftLeft(shifted, 23), bits(0x3f800000)),
          ),
        ),
      ),
    ),
  );
/** ln x = e ln 2 + ln m with m in [√½, √2), and ln m = 2 artanh((m − 1) / (m + 1)). */
const log = (x: Code): Code =>
  using(shiftRight(subBits(x, bits(0x3f3504f3)), 23), e =>
    using(subBits(x, shiftLeft(e, 23)), m =>
      using(div(sub(m, num(1)), add(m, num(1))), s =>
        using(mul(s, s), q => {
          const finite = add(
            mul(toFloat(e), num(Math.LN2)),
            mul(s, polynomial(q, [2, 2 / 3, 2 / 5, 2 / 7, 2 / 9])),
          );
          const orInfinite = sub(
            add(finite, and(x, equal(x, num(Infinity)))),
            and(num(Infinity), equal(x, num(0))),
          );
          return or(orInfinite, not(greaterEqual(x, num(0)))); // all bits set is NaN
        }),
      ),
    ),
  );
/** Abramowitz and Stegun 7.1.26, as in the stock kernel: within 1.5e-7; odd, so computed for |x|. */
const erf = (x: Code): Code =>
  using(abs(x), z =>
    using(div(num(1), add(num(1), mul(z, num(0.3275911)))), t => {
      const p = polynomial(t, [0, 0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429]);
      return or(sub(num(1), mul(p, exp(sub(num(0), mul(z, z))))), and(x, num(-0)));
    }),
  );
/** (e²ˣ − 1) / (e²ˣ + 1), and near 0, where that cancels, its series */
const tanh = (x: Code): Code =>
  using(exp(mul(pmin(x, num(20)), num(2))), e =>
    using(mul(x, x), q => {
      const series = mul(x, polynomial(q, [1, -1 / 3, 2 / 15, -17 / 315]));
      return choose(series, div(sub(e, num(1)), add(e, num(1))), less(q, num(0.04)));
    }),
  );

const FORMULAS: Record<string, Formula> = {
  Exp: unary(exp),
  Log: unary(log),
  Erf: unary(erf),
  Tanh: unary(tanh),
  Sqrt: unary(sqrt),
  Rsqrt: unary(x => div(num(1), sqrt(x))),
  Pow: binary((x, p) => exp(mul(p, log(x)))),
  Maximum: binary(max),
  Minimum: binary(min),
  Equal: binary(equal, 'bool'),
  Less: binary(less, 'bool'),
  LessEqual: binary(lessEqual, 'bool'),
  Greater: binary(greater, 'bool'),
  GreaterEqual: binary(greaterEqual, 'bool'),
  LogicalAnd: { takes: ['bool', 'bool'], gives: 'bool', code: and },
  Select: { takes: ['bool', 'float32', 'float32'], gives: 'float32', code: (c, t, e) => choose(t!, e!, c!) },
};

declare const WebAssembly: {
  Module: new (bytes: Uint8Array) => object;
  Instance: new (
    module: object,
    imports: object,
  ) => { exports: Record<string, (...numbers: number[]) => void> };
};

/**
 * A function for each formula: (vectors, addresses of output and inputs, byte steps of output and inputs).
 * (Loops in JavaScript would be no faster than the stock kernels: once the heap has grown, V8 checks each access.)
 */
function compile(memory: object) {
  const local = (get: number, index: number): Code => [get, ...leb(index)];
  const functions = Object.values(FORMULAS).map(({ takes, gives, code }) => {
    const pointers = [1, ...takes.map((_, i) => 2 + i)];
    const parameters = 1 + 2 * pointers.length;
    locals = parameters;
    const inputs = takes.map((dtype, i) => [
      ...local(0x20, 2 + i),
      // a bool is a byte of 0 or 1: to four lanes of no bits or all bits
      ...(dtype === 'bool'
        ? [0xfd, 0x5c, 0, 0, 0xfd, 0x89, 1, 0xfd, 0xa9, 1, 0xfd, 0xa1, 1]
        : [0xfd, 0, 0, 0]),
    ]);
    const loop = [
      ...[0x03, 0x40, ...local(0x20, 1), ...code(...inputs)],
      // the lanes' first bits, spread to four bytes
      ...(gives === 'bool'
        ? [0xfd, 0xa4, 1, 0x41, ...leb(0x204081), 0x6c, 0x41, ...leb(0x01010101), 0x71, 0x36, 0, 0]
        : [0xfd, 0x0b, 0, 0]),
      ...pointers.flatMap(p => [
        ...local(0x20, p),
        ...local(0x20, p + pointers.length),
        0x6a,
        ...local(0x21, p),
      ]),
      ...[0x20, 0, 0x41, 1, 0x6b, 0x22, 0, 0x0d, 0, 0x0b, 0x0b], // again while --vectors
    ];
    const body = [1, ...leb(locals - parameters), 0x7b, ...loop];
    return {
      type: [0x60, parameters, ...Array(parameters).fill(0x7f), 0],
      code: [...leb(body.length), ...body],
    };
  });
  const name = (text: string): Code => [text.length, ...Buffer.from(text)];
  const section = (id: number, entries: Code[]): Code => {
    const content = [...leb(entries.length), ...entries.flat()];
    return [id, ...leb(content.length), ...content];
  };
  const bytes = new Uint8Array([
    ...[0, 0x61, 0x73, 0x6d, 1, 0, 0, 0],
    ...section(
      1,
      functions.map(f => f.type),
    ),
    ...section(2, [[...name('js'), ...name('memory'), 2, 0, 0]]),
    ...section(
      3,
      functions.map((_, i) => leb(i)),
    ),
    ...section(
      7,
      Object.keys(FORMULAS).map((key, i) => [...name(key), 0, ...leb(i)]),
    ),
    ...section(
      10,
      functions.map(f => f.code),
    ),
  ]);
  return new WebAssembly.Instance(new WebAssembly.Module(bytes), { js: { memory } }).exports;
}
