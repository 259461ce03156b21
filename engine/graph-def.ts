/** A recording as nodes of a TensorFlow graph: a line or two for each of TFJS's kernels, which are mostly TensorFlow's ops. */
import { axesOf, axisOf, type Dtype, type Node as Kernel, UnknownKernel, type Value } from './record.ts';
import { type Attr, AttrType, constAttrs, DataType, type Node } from './saved-model.ts';

export const typeAttr = (name: string, value: number): Attr => ({ name, type: AttrType.type, value });
export const shapeAttr = (value: number[]): Attr => ({ name: 'shape', type: AttrType.shape, value });
const [FLOAT, INT, BFLOAT16] = [DataType.float32!, DataType.int32!, 14];

/** Ops with the name of the kernel and one attribute, T; and those of another name. */
const SAME = new Set(
  (
    'Abs Ceil Cos Elu Equal Erf Exp Floor Greater GreaterEqual IsFinite IsInf IsNan Less LessEqual Log Maximum Minimum Neg ' +
    'NotEqual Pow RealDiv Reciprocal Relu Round Rsqrt Sigmoid Sign Sin Softmax Softplus Sqrt Square SquaredDifference ' +
    'Sub Tanh ZerosLike'
  ).split(' '),
);
const RENAMED: Record<string, string> = { Add: 'AddV2', Multiply: 'Mul' };

export interface GraphOptions {
  /** compile with XLA what it can */
  xla?: boolean;
  /** round the factors of matrix products and the product to bfloat16 */
  bf16?: boolean;
}

/**
 * The nodes, their names under `prefix`, and what finds a value's name in them.
 * @param given names of the values that are made elsewhere
 * @throws UnknownKernel
 */
export function graphNodes(
  kernels: readonly Kernel[],
  prefix: string,
  given: ReadonlyMap<Value, string>,
  { xla = false, bf16 = false }: GraphOptions,
): { nodes: Node[]; refOf: (value: Value) => string } {
  const nodes: Node[] = [];
  const refs = new Map(given);
  const constants = new Map<string, string>();
  const put = (op: string, inputs: string[], attrs: Attr[] = []): string => {
    const name = `${prefix}/${nodes.length}`;
    // XLA's generator would draw other bits for a seed, so stateless random ops stay TensorFlow's
    const compile: Attr = { name: '_XlaCompile', type: AttrType.bool, value: !op.startsWith('Stateless') };
    nodes.push({ name, op, inputs, attrs: xla ? [...attrs, compile] : attrs });
    return name;
  };
  const constant = (shape: number[], dtype: number, numbers: Parameters<typeof constAttrs>[2]): string => {
    const attrs = constAttrs(shape, dtype, numbers);
    const key = JSON.stringify(attrs);
    const name = constants.get(key) ?? put('Const', [], attrs);
    constants.set(key, name);
    return name;
  };
  const whole = (x: number) => constant([], INT, Int32Array.of(x));
  const wholes = (xs: number[]) => constant([xs.length], INT, Int32Array.from(xs));
  const scalar = (x: number, dtype: Dtype = 'float32') =>
    constant([], DataType[dtype]!, { float32: Float32Array, int32: Int32Array, bool: Uint8Array }[dtype].of(x));
  const ref = (value: Value): string => {
    const known = refs.get(value) ?? constant(value.shape, DataType[value.dtype]!, value.constant!);
    refs.set(value, known);
    return known;
  };
  const index = (name: string) => typeAttr(name, INT);
  const bool = (name: string, value: unknown): Attr => ({ name, type: AttrType.bool, value: Boolean(value) });
  const count = (name: string, value: number): Attr => ({ name, type: AttrType.int, value });
  const cast = (x: string, from: number, to: number) =>
    put('Cast', [x], [typeAttr('SrcT', from), typeAttr('DstT', to), bool('Truncate', false)]);

  for (const { kernel, inputs, attrs, outputs } of kernels) {
    // biome-ignore lint/suspicious/noExplicitAny: attributes are what TFJS says they are
    const a = attrs as any;
    const ins = inputs.map(ref);
    const [x = '', y = '', z = ''] = ins;
    const [shape, out] = [inputs[0]?.shape ?? [], outputs[0]!];
    const T = typeAttr('T', DataType[(inputs[0] ?? out).dtype]!);
    const reduce = () => {
      const axes = wholes(axesOf(a.axis ?? a.reductionIndices, shape));
      return put(kernel, [x, axes], [T, index('Tidx'), bool('keep_dims', a.keepDims)]);
    };
    const ops: Record<string, () => string> = {
      AddN: () => put('AddN', ins, [T, count('N', ins.length)]),
      BatchMatMul: () => {
        const transposes = [bool('adj_x', a.transposeA), bool('adj_y', a.transposeB)];
        if (!bf16 || out.dtype !== 'float32') return put('BatchMatMulV2', ins, [T, ...transposes]);
        const factors = ins.map(factor => cast(factor, FLOAT, BFLOAT16));
        return cast(put('BatchMatMulV2', factors, [typeAttr('T', BFLOAT16), ...transposes]), BFLOAT16, FLOAT);
      },
      Cast: () => cast(x, DataType[inputs[0]!.dtype]!, DataType[out.dtype]!),
      ClipByValue: () =>
        put('ClipByValue', [x, scalar(a.clipValueMin, out.dtype), scalar(a.clipValueMax, out.dtype)], [T]),
      Concat: () => put('ConcatV2', [...ins, whole(axisOf(a.axis, shape))], [T, index('Tidx'), count('N', ins.length)]),
      Cumsum: () =>
        put(
          'Cumsum',
          [x, whole(axisOf(a.axis, shape))],
          [T, index('Tidx'), bool('exclusive', a.exclusive), bool('reverse', a.reverse)],
        ),
      Fill: () => put('Fill', [wholes(a.shape), scalar(a.value, out.dtype)], [T, index('index_type')]),
      GatherV2: () =>
        put(
          'GatherV2',
          [x, y, whole(axisOf(a.axis, shape))],
          [typeAttr('Tparams', T.value as number), index('Tindices'), index('Taxis')],
        ),
      LeakyRelu: () => put('LeakyRelu', [x], [T, { name: 'alpha', type: AttrType.float, value: a.alpha }]),
      LogicalAnd: () => put('LogicalAnd', ins),
      LogicalNot: () => put('LogicalNot', ins),
      LogicalOr: () => put('LogicalOr', ins),
      OneHot: () => {
        const values = [scalar(a.onValue ?? 1, out.dtype), scalar(a.offValue ?? 0, out.dtype)];
        return put(
          'OneHot',
          [x, whole(a.depth), ...values],
          [typeAttr('T', DataType[out.dtype]!), index('TI'), count('axis', -1)],
        );
      },
      Pack: () => put('Pack', ins, [T, count('N', ins.length), count('axis', a.axis)]),
      PadV2: () => {
        const paddings = constant([shape.length, 2], INT, Int32Array.from(a.paddings.flat()));
        return put('PadV2', [x, paddings, scalar(a.constantValue ?? 0, out.dtype)], [T, index('Tpaddings')]);
      },
      Reshape: () => put('Reshape', [x, wholes(out.shape)], [T, index('Tshape')]),
      Select: () => put('SelectV2', ins, [typeAttr('T', DataType[out.dtype]!)]),
      Slice: () => {
        const begin = out.shape.map((_, i) => [a.begin].flat()[i] ?? 0);
        return put('Slice', [x, wholes(begin), wholes(out.shape)], [T, index('Index')]);
      },
      SplitV: () => {
        const at = axisOf(a.axis, shape);
        const sizes = wholes(outputs.map(o => o.shape[at]!));
        return put('SplitV', [x, sizes, whole(at)], [T, index('Tlen'), count('num_split', outputs.length)]);
      },
      Step: () => put('SelectV2', [put('Greater', [x, scalar(0)], [T]), scalar(1), scalar(a.alpha ?? 0)], [T]),
      TensorScatterUpdate: () => put('TensorScatterUpdate', [x, y, z], [T, index('Tindices')]),
      Tile: () => put('Tile', [x, wholes(a.reps)], [T, index('Tmultiples')]),
      TopK: () => put('TopKV2', [x, whole(a.k)], [T, bool('sorted', a.sorted ?? true)]),
      Transpose: () => put('Transpose', [x, wholes(a.perm)], [T, index('Tperm')]),
      Uniform: () => {
        const seed = put('AddV2', [x, wholes([a.purpose, 0])], [T]);
        return put(
          'StatelessRandomUniform',
          [wholes(out.shape), seed],
          [typeAttr('dtype', FLOAT), index('T'), index('Tseed')],
        );
      },
      Unpack: () => put('Unpack', [x], [T, count('num', outputs.length), count('axis', a.axis)]),
      UnsortedSegmentSum: () =>
        put('UnsortedSegmentSum', [x, y, whole(a.numSegments)], [T, index('Tindices'), index('Tnumsegments')]),
      ...{ Sum: reduce, Mean: reduce, Max: reduce, Min: reduce },
    };
    const op = RENAMED[kernel] ?? (SAME.has(kernel) ? kernel : undefined);
    const made = op ? put(op, ins, [T]) : ops[kernel]?.();
    if (!made) throw new UnknownKernel(kernel);
    for (const [k, output] of outputs.entries()) refs.set(output, k ? `${made}:${k}` : made);
  }
  return { nodes, refOf: ref };
}
