/**
 * Elementwise formulas, compiled to WebAssembly SIMD: four numbers at a time, in the memory that they lie in.
 *
 * TFJS's WebAssembly backend computes exp, tanh, pow, >, where and others by a call for each element, 3 to 14 ns.
 * JavaScript loops would not help: once that memory has grown, V8 checks each access to it (2 ns). Compiled, the
 * formulas below take 0.1 (comparisons, where) to 2 ns (pow). A formula is written as a function of its inputs and
 * its value is the list of WebAssembly instructions that computes it; engine/wasm.ts makes kernels of them.
 */
import type { DataType } from '@tensorflow/tfjs';

/** The instructions that leave a vector of four lanes on the stack. */
type Code = number[];
export interface Formula {
  takes: DataType[];
  gives: DataType;
  code: (...inputs: Code[]) => Code;
}
/** Runs a formula on 4 · vectors elements, given the addresses and then the byte steps of output and inputs. */
export type Compiled = (vectors: number, ...addressesAndSteps: number[]) => void;

// ---- Instructions ----

/** LEB128, for numbers that are not negative */
const leb = (n: number): Code => (n < 64 ? [n] : [(n & 127) | 128, ...leb(n >>> 7)]);
const op =
  (opcode: number) =>
  (...operands: Code[]): Code => [...operands.flat(), 0xfd, ...leb(opcode)];
const [add, sub, mul, div, sqrt, abs] = [op(0xe4), op(0xe5), op(0xe6), op(0xe7), op(0xe3), op(0xe0)];
const [min, max, atMost, atLeast] = [op(0xe8), op(0xe9), op(0xea), op(0xeb)]; // the last two: (x, bound), NaN stays
const [equal, less, greater, lessEqual, greaterEqual] = [op(0x41), op(0x43), op(0x44), op(0x45), op(0x46)];
const [and, or, not, choose] = [op(0x4e), op(0x50), op(0x4d), op(0x52)]; // bitwise; choose(yes, no, mask)
const [addInt, subInt, notEqualInt, toFloat] = [op(0xae), op(0xb1), op(0x38), op(0xfa)];
const shiftLeft = (x: Code, by: number): Code => op(0xab)(x, [0x41, by]);
const shiftRight = (x: Code, by: number): Code => op(0xac)(x, [0x41, by]);
const num = (x: number): Code => [0x43, ...new Uint8Array(new Float32Array([x]).buffer), 0xfd, 0x13];
const int = (n: number): Code => [0x41, ...leb(n), 0xfd, 0x11];
const get = (local: number): Code => [0x20, ...leb(local)];
const set = (local: number): Code => [0x21, ...leb(local)];

let locals = 0; // of the function being compiled
/** body(v), with v the value computed once */
const using = (value: Code, body: (v: Code) => Code): Code => {
  const v = locals++;
  return [...value, ...set(v), ...body(get(v))];
};
/** c₀ + c₁ x + c₂ x² + ... */
const polynomial = (x: Code, [c, ...higher]: number[]): Code =>
  higher.length ? add(num(c!), mul(x, polynomial(x, higher))) : num(c!);

// ---- Formulas ----

/** eˣ = 2ⁿ eʳ with n = round(x / ln 2), so |r| < 0.35. 0 below e⁻⁸⁷·³ (no denormals), infinite above e⁸⁸·³ */
const exp = (x: Code): Code =>
  using(atLeast(atMost(x, num(89)), num(-88)), y =>
    using(
      add(mul(y, num(Math.LOG2E)), num(1.5 * 2 ** 23)),
      shifted => // rounds; n is now in the lowest bits
        using(sub(shifted, num(1.5 * 2 ** 23)), n => {
          const twoToTheN = addInt(shiftLeft(shifted, 23), int(0x3f800000)); // n in the exponent's bits
          const [high, low] = [0.693359375, Math.LN2 - 0.693359375]; // ln 2 in two parts: n · high is exact
          const r = sub(sub(y, mul(n, num(high))), mul(n, num(low)));
          return using(r, r => mul(polynomial(r, [1, 1, 1 / 2, 1 / 6, 1 / 24, 1 / 120, 1 / 720]), twoToTheN));
        }),
    ),
  );

/** ln x = e ln 2 + ln m with √½ < m < √2, and ln m = 2 artanh s with s = (m − 1) / (m + 1) */
const log = (x: Code): Code =>
  using(shiftRight(subInt(x, int(0x3f3504f3)), 23), e =>
    using(subInt(x, shiftLeft(e, 23)), m =>
      using(div(sub(m, num(1)), add(m, num(1))), s => {
        const lnM = using(mul(s, s), q => mul(s, polynomial(q, [2, 2 / 3, 2 / 5, 2 / 7, 2 / 9])));
        const finite = add(mul(toFloat(e), num(Math.LN2)), lnM);
        const orInfinite = sub(add(finite, and(x, equal(x, num(Infinity)))), and(num(Infinity), equal(x, num(0))));
        return or(orInfinite, not(greaterEqual(x, num(0)))); // all bits set is NaN
      }),
    ),
  );

/** (e²ˣ − 1) / (e²ˣ + 1); near 0, where that cancels, the series */
const tanh = (x: Code): Code =>
  using(exp(mul(atMost(x, num(20)), num(2))), e => {
    const ratio = div(sub(e, num(1)), add(e, num(1)));
    return using(mul(x, x), q =>
      choose(mul(x, polynomial(q, [1, -1 / 3, 2 / 15, -17 / 315])), ratio, less(q, num(0.04))),
    );
  });

/** Abramowitz and Stegun 7.1.26, which the stock kernel uses too: within 1.5e-7. Computed for |x|, then x's sign */
const erf = (x: Code): Code =>
  using(abs(x), z =>
    using(div(num(1), add(num(1), mul(z, num(0.3275911)))), t => {
      const p = polynomial(t, [0, 0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429]);
      return or(sub(num(1), mul(p, exp(sub(num(0), mul(z, z))))), and(x, num(-0)));
    }),
  );

const formula = (takes: DataType[], gives: DataType, code: (...inputs: Code[]) => Code): Formula => ({
  takes,
  gives,
  code,
});
const unary = (code: (x: Code) => Code) => formula(['float32'], 'float32', code as Formula['code']);
const binary = (code: (a: Code, b: Code) => Code) =>
  formula(['float32', 'float32'], 'float32', code as Formula['code']);
const comparison = (code: Formula['code']) => formula(['float32', 'float32'], 'bool', code);

/** By the names of TFJS's kernels, which are the same functions. */
export const FORMULAS: Record<string, Formula> = {
  Exp: unary(exp),
  Log: unary(log),
  Tanh: unary(tanh),
  Erf: unary(erf),
  Sqrt: unary(sqrt),
  Rsqrt: unary(x => div(num(1), sqrt(x))),
  Pow: binary((x, p) => exp(mul(p, log(x)))), // of x >= 0; NaN for others
  Maximum: binary(max),
  Minimum: binary(min),
  Equal: comparison(equal),
  Less: comparison(less),
  LessEqual: comparison(lessEqual),
  Greater: comparison(greater),
  GreaterEqual: comparison(greaterEqual),
  LogicalAnd: formula(['bool', 'bool'], 'bool', and),
  Select: formula(['bool', 'float32', 'float32'], 'float32', (c, t, e) => choose(t!, e!, c!)),
};

// ---- The module ----

declare const WebAssembly: {
  Module: new (bytes: Uint8Array) => object;
  Instance: new (module: object, imports: object) => { exports: Record<string, Compiled> };
};

/** The body of: do { out = formula(inputs); every pointer += its step } while (--vectors) */
function loop({ takes, gives, code }: Formula): { parameters: number; body: Code } {
  // parameters: vectors, a pointer for the output and for each input, a step for each of them; then the locals
  const pointers = [1, ...takes.map((_, i) => 2 + i)];
  const parameters = 1 + 2 * pointers.length;
  locals = parameters;
  const load = (pointer: number, opcode: number): Code => [...op(opcode)(get(pointer)), 0, 0];
  // a bool is one byte: four of them to four lanes, all bits set where true
  const inputs = takes.map((dtype, i) =>
    dtype === 'bool' ? notEqualInt(op(0xa9)(op(0x89)(load(2 + i, 0x5c))), int(0)) : load(2 + i, 0),
  );
  const value = [...get(1), ...code(...inputs)];
  // bools: the lanes' first bits in one number, spread to four bytes (a product and a mask), stored as an i32
  const spread: Code = [0x41, ...leb(0x204081), 0x6c, 0x41, ...leb(0x01010101), 0x71];
  const store = gives === 'bool' ? [...op(0xa4)(value), ...spread, 0x36, 0, 0] : [...op(0x0b)(value), 0, 0];
  const advance = pointers.flatMap(p => [...get(p), ...get(p + pointers.length), 0x6a, ...set(p)]);
  const again: Code = [...get(0), 0x41, 1, 0x6b, 0x22, 0, 0x0d, 0];
  const body = [1, ...leb(locals - parameters), 0x7b, 0x03, 0x40, ...store, ...advance, ...again, 0x0b, 0x0b];
  return { parameters, body };
}

/** Compiles the formulas to functions on a WebAssembly.Memory. */
export function compileFormulas(memory: object): Record<string, Compiled> {
  const loops = Object.values(FORMULAS).map(loop);
  const name = (text: string): Code => [text.length, ...Buffer.from(text)];
  const section = (id: number, entries: Code[]): Code => {
    const content = [...leb(entries.length), ...entries.flat()];
    return [id, ...leb(content.length), ...content];
  };
  const I32 = 0x7f;
  const types = loops.map(({ parameters }) => [0x60, parameters, ...Array<number>(parameters).fill(I32), 0]);
  const imports = [[...name('js'), ...name('memory'), 2, 0, 0]];
  const exports = Object.keys(FORMULAS).map((key, i) => [...name(key), 0, ...leb(i)]);
  const bytes = [
    ...[...Buffer.from('\0asm'), 1, 0, 0, 0],
    ...section(1, types),
    ...section(2, imports),
    ...section(
      3,
      loops.map((_, i) => leb(i)),
    ), // function i has type i
    ...section(7, exports),
    ...section(
      10,
      loops.map(({ body }) => [...leb(body.length), ...body]),
    ),
  ];
  return new WebAssembly.Instance(new WebAssembly.Module(new Uint8Array(bytes)), { js: { memory } }).exports;
}
