/**
 * How a decomposition with a known answer is marked.
 *
 * From the SPD paper (arXiv 2506.20790): MMCS and ML2R, do the components lie along the true ones and are they as long.
 * From the original's checks: identity-CI error and dense error, on the matrix of importances [n inputs, C components].
 */
import * as tf from '@tensorflow/tfjs';
import { importances, inputBatch, type Module, numbers, type Run, range, sum, U, V } from '../nano-param-decomp.ts';

export type Matrix = readonly ArrayLike<number>[];

/**
 * The best assignment of rows to columns (Hungarian method, O(n² m), n ≤ m): `columns[i]` is row i's, all different, and
 * Σ score[i][columns[i]] is the largest there is.
 */
export function assignment(score: Matrix): number[] {
  const n = score.length;
  const m = score[0]?.length ?? 0;
  if (n > m) throw new RangeError(`assignment: ${n} rows are more than ${m} columns`);
  // Row and column potentials, and the row of each column; row and column 0 stand for "none".
  const [u, v] = [new Float64Array(n + 1), new Float64Array(m + 1)];
  const [rowOf, before] = [new Int32Array(m + 1), new Int32Array(m + 1)];
  for (let i = 1; i <= n; i++) {
    rowOf[0] = i;
    let j0 = 0;
    const slack = new Float64Array(m + 1).fill(Infinity);
    const done = new Uint8Array(m + 1);
    do {
      done[j0] = 1;
      const row = rowOf[j0]!;
      let [delta, next] = [Infinity, 0];
      for (let j = 1; j <= m; j++) {
        if (done[j]) continue;
        const reduced = -score[row - 1]![j - 1]! - u[row]! - v[j]!;
        if (reduced < slack[j]!) [slack[j], before[j]] = [reduced, j0];
        if (slack[j]! < delta) [delta, next] = [slack[j]!, j];
      }
      for (let j = 0; j <= m; j++) {
        if (done[j]) {
          u[rowOf[j]!]! += delta;
          v[j]! -= delta;
        } else slack[j]! -= delta;
      }
      j0 = next;
    } while (rowOf[j0] !== 0);
    for (let j = j0; j !== 0; j = before[j]!) rowOf[j] = rowOf[before[j]!]!; // along the path found
  }
  const columns = new Array<number>(n).fill(0);
  for (let j = 1; j <= m; j++) if (rowOf[j]) columns[rowOf[j]! - 1] = j - 1;
  return columns;
}

/** One component per input: after the best permutation, the entries that are off the identity by more than `tol`. */
export function identityCiError(ci: Matrix, tol = 0.1): number {
  const columns = assignment(ci);
  const wrong = (row: ArrayLike<number>, i: number) =>
    sum(Array.from(row, (g, c) => Number(c === columns[i] ? g < 1 - tol : g > tol)));
  return sum(Array.from(ci, wrong));
}

/** k components in use: of the k with the largest sums each needs an entry ≥ 1 − tol; in the others, entries > tol are errors. */
export function denseCiError(ci: Matrix, k: number, tol = 0.1): number {
  const columns = range(0, ci[0]?.length ?? 0).map(c => Array.from(ci, row => row[c]!));
  columns.sort((a, b) => sum(b) - sum(a));
  const errors = (column: number[], rank: number) =>
    rank < k ? Number(Math.max(...column) < 1 - tol) : column.filter(g => g > tol).length;
  return sum(columns.map(errors));
}

/**
 * Of true vectors w_j [m, d] and components v [m, C], u [C, d] (component c writes u_c v_jc for feature j):
 * MMCS, the mean over j of the largest cosine of u_c v_jc and w_j, and ML2R, the mean of ‖u_c v_jc‖ / ‖w_j‖ at it. The
 * paper takes all components; `shortest` leaves out those with a ratio below it, since among dead ones of length 1e-3 one
 * points anywhere by chance, and then ML2R is the length of a component that does nothing.
 */
export function matchFeatures(w: Matrix, v: Matrix, u: Matrix, shortest = 0): { mmcs: number; ml2r: number } {
  const dot = (a: ArrayLike<number>, b: ArrayLike<number>) => sum(Array.from(a, (x, i) => x * b[i]!));
  const norm = (a: ArrayLike<number>) => Math.sqrt(dot(a, a));
  const best = Array.from(w, (wj, j) => {
    const ratios = Array.from(u, (uc, c) => (Math.abs(v[j]![c]!) * norm(uc)) / norm(wj));
    const cosines = Array.from(u, (uc, c) => (Math.sign(v[j]![c]!) * dot(uc, wj)) / (norm(uc) * norm(wj) || 1));
    const c = cosines.indexOf(Math.max(...cosines.filter((_, k) => ratios[k]! >= shortest)));
    return { cosine: cosines[c] ?? 0, ratio: ratios[c] ?? 0 }; // none is long enough: nothing found
  });
  return { mmcs: sum(best.map(b => b.cosine)) / w.length, ml2r: sum(best.map(b => b.ratio)) / w.length };
}

/** A flat array as rows of `width`. */
export const rowsOf = (flat: ArrayLike<number>, width: number): number[][] =>
  range(0, flat.length / width).map(r => Array.from({ length: width }, (_, i) => flat[r * width + i]!));

/** The importances [n, C] of a module on n one-hot inputs of value 0.75. */
export async function ciOnOneHot({ problem, params }: Run, n: number): Promise<Map<Module, number[][]>> {
  const rows = { count: n, seqLen: 1, row: (i: number) => new Float32Array(n).fill(0.75, i, i + 1) };
  const inputs = inputBatch(rows, range(0, n));
  const parts = tf.tidy(() =>
    tf.split(
      importances(problem, params, inputs).g,
      problem.modules.map(m => m.C),
      1,
    ),
  );
  const flat = await Promise.all(parts.map(numbers));
  tf.dispose([inputs, parts]);
  return new Map(problem.modules.map((m, i) => [m, rowsOf(flat[i]!, m.C)]));
}

/** V [dIn][C] and U [C][dOut] of a module as rows. */
export async function factors({ params }: Run, m: Module) {
  const [v, u] = await Promise.all([V(params, m), U(params, m)].map(numbers));
  return { v: rowsOf(v!, m.C), u: rowsOf(u!, m.dOut) };
}
