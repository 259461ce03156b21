/**
 * A recording as an ONNX model: one line or two for each of TFJS's kernels, and the few protobuf messages around them
 * (the numbers are those of onnx.proto). A model computes and keeps nothing: the state goes in and comes out.
 */

import { float, int, message } from './protobuf.ts';
import { axesOf, axisOf, type Dtype, type Node, sizeOf, UnknownKernel, type Value } from './record.ts';

const TYPE = { float32: 1, int32: 6, int64: 7, bool: 9 } as const;
type Kind = keyof typeof TYPE;
const [IR_VERSION, OPSET] = [10, 21];
const MAX_TERMS = 2 ** 13; // of one sum

/** Kernels that are one of ONNX's operators as they stand. */
const SAME: Record<string, string> = {
  ...Object.fromEntries(
    'Abs Add Ceil Cos Equal Erf Exp Floor Greater Less Log Neg Pow Reciprocal Relu Round Sigmoid Sign Sin Softmax Softplus Sqrt Sub Tanh'
      .split(' ')
      .map(name => [name, name]),
  ),
  ...{ AddN: 'Sum', GreaterEqual: 'GreaterOrEqual', IsInf: 'IsInf', IsNan: 'IsNaN', LessEqual: 'LessOrEqual' },
  ...{ LogicalAnd: 'And', LogicalNot: 'Not', LogicalOr: 'Or', Maximum: 'Max', Minimum: 'Min', Multiply: 'Mul' },
  RealDiv: 'Div',
};

/** `inputs`: what a run must be given; `drawn`: random numbers among them, which the host makes. */
export interface Model {
  bytes: Uint8Array;
  inputs: Value[];
  drawn: Node[];
}
/** A result that is no tensor, and stands first: see runModel in onnxruntime.ts. */
export const NO_TENSOR = 'none';
/** The name of a value in a model. */
export const nameOf = ({ id }: Value): string => `t${id}`;

/**
 * The model of `nodes`, in their order; `given`: values made elsewhere; `results`: names of the outputs; `names`: of others.
 * ONNX wants nodes in an order in which they can run (`inOrder`). ONNX Runtime takes any, and computes what the last results
 * need, of a node's inputs first what stands last: reversed, it runs nearly as recorded and keeps a quarter less alive. A
 * model for it has the result NO_TENSOR besides.
 * @throws UnknownKernel
 */
export function onnxModel(
  nodes: readonly Node[],
  given: Iterable<Value>,
  results: [string, Value][],
  { names = [], inOrder = false }: { names?: Iterable<readonly [Value, string]>; inOrder?: boolean } = {},
): Model {
  const body: Buffer[] = [];
  const constants = new Map<string, Buffer>();
  const inputs = new Map<string, Value>();
  const drawn: Node[] = [];
  let temporaries = 0;
  let at = ''; // of the node that is being written

  const constant = (name: string, kind: Kind, shape: number[], data: ArrayBufferView): string => {
    const raw = () => new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
    const dims = shape.map(size => int(1, size));
    if (!constants.has(name))
      constants.set(name, message(5, ...dims, int(2, TYPE[kind]), message(8, name), message(9, raw())));
    return name;
  };
  const longs = (...xs: number[]) =>
    constant(`i${xs.join('_')}`, 'int64', [xs.length], BigInt64Array.from(xs.map(BigInt)));
  const scalar = (x: number, dtype: Dtype = 'float32') => {
    const data = { float32: Float32Array, int32: Int32Array, bool: Uint8Array }[dtype].of(x);
    return constant(`${dtype}_${Object.is(x, -0) ? '-0' : x}`, dtype, [], data);
  };
  const known = new Set(given);
  // a result that is made here has its name from the start: an Identity would copy it
  const inside = new Set(nodes.flatMap(node => (node.kernel === 'Uniform' ? [] : node.outputs)));
  const made = results.flatMap(([as, value]) => (inside.has(value) ? [[value, as] as const] : []));
  const named = new Map([...names, ...made]);
  const name = (x: Value): string => {
    if (x.constant) return constant(nameOf(x), x.dtype, x.shape, x.constant);
    const as = named.get(x) ?? nameOf(x);
    if (known.has(x)) inputs.set(as, x);
    return as;
  };
  const emit = (op: string, ins: string[], outs = [`x${temporaries++}`], attrs: object = {}, domain = ''): string => {
    const attribute = ([key, value]: [string, number | number[]]) => {
      if (Array.isArray(value)) return message(5, message(1, key), ...value.map(x => int(8, x)), int(20, 7));
      const whole = Number.isInteger(value) && key !== 'alpha';
      return message(5, message(1, key), ...(whole ? [int(3, value), int(20, 2)] : [float(2, value), int(20, 1)]));
    };
    const ends = [...ins.map(x => message(1, x)), ...outs.map(x => message(2, x))];
    const rest = Object.entries(attrs).map(attribute);
    const where = at ? [message(3, `${at}/${op}_${body.length}`)] : [];
    body.push(message(1, ...ends, ...where, message(4, op), ...rest, ...(domain ? [message(7, domain)] : [])));
    return outs[0]!;
  };

  /** What the operator may take for its i-th input: what that was made from in this model. */
  const repeats = ({ kernel, inputs }: Node, i: number): Value | undefined => {
    const x = inputs[i]!;
    const made = inside.has(x) ? x.node! : undefined;
    const fits =
      (kernel === 'Sum' && made?.kernel === 'Square') ||
      (kernel === 'Select' && i === 0 && made?.kernel === 'Tile' && sizeOf(made.inputs[0]!.shape) === 1) ||
      (kernel === 'Select' && i === 2 && made?.kernel === 'ZerosLike');
    return fits ? made!.inputs[0]! : undefined;
  };
  /** More than one operator, or one with attributes: x, y are names, `ins` and `outs` values. */
  // biome-ignore lint/suspicious/noExplicitAny: attributes are what TFJS says they are
  const lower: Record<string, (node: Node, a: any, out: string[], x: string, y: string, z: string) => unknown> = {
    BatchMatMul: (_, { transposeA, transposeB }, out, x, y) =>
      transposeA || transposeB
        ? emit(
            'FusedMatMul',
            [x, y],
            out,
            { transA: Number(!!transposeA), transB: Number(!!transposeB) },
            'com.microsoft',
          )
        : emit('MatMul', [x, y], out),
    Cast: (_, { dtype }, out, x) => emit('Cast', [x], out, { to: TYPE[dtype as Dtype] }),
    ClipByValue: ({ inputs: [v] }, { clipValueMin, clipValueMax }, out, x) =>
      emit('Clip', [x, scalar(clipValueMin, v!.dtype), scalar(clipValueMax, v!.dtype)], out),
    Concat: ({ inputs }, { axis }, out) =>
      emit('Concat', inputs.map(name), out, { axis: axisOf(axis, inputs[0]!.shape) }),
    Cumsum: ({ inputs: [v] }, { axis, exclusive, reverse }, out, x) =>
      emit('CumSum', [x, longs(axisOf(axis, v!.shape))], out, {
        exclusive: Number(!!exclusive),
        reverse: Number(!!reverse),
      }),
    Elu: (_n, _a, out, x) => emit('Elu', [x], out, { alpha: 1 }),
    Fill: ({ outputs: [v] }, { shape, value }, out) => emit('Expand', [scalar(value, v!.dtype), longs(...shape)], out),
    GatherV2: ({ inputs: [v] }, { axis }, out, x, y) => emit('Gather', [x, y], out, { axis: axisOf(axis, v!.shape) }),
    IsFinite: (_n, _a, out, x) => emit('Not', [emit('Or', [emit('IsNaN', [x]), emit('IsInf', [x])])], out),
    LeakyRelu: (_, { alpha }, out, x) => emit('LeakyRelu', [x], out, { alpha }),
    NotEqual: (_n, _a, out, x, y) => emit('Not', [emit('Equal', [x, y])], out),
    OneHot: ({ inputs: [v], outputs }, { depth, onValue = 1, offValue = 0 }, out, x) => {
      const all = constant(
        `iota${depth}`,
        'int32',
        [depth],
        Int32Array.from({ length: depth }, (_, i) => i),
      );
      const hot = emit('Equal', [emit('Unsqueeze', [x, longs(v!.shape.length)]), all]);
      const { dtype } = outputs[0]!;
      if (onValue === 1 && offValue === 0) emit('Cast', [hot], out, { to: TYPE[dtype] });
      else emit('Where', [hot, scalar(onValue, dtype), scalar(offValue, dtype)], out);
    },
    Pack: ({ inputs }, { axis }, out) => {
      const at = axis < 0 ? axis + inputs[0]!.shape.length + 1 : axis;
      emit(
        'Concat',
        inputs.map(v => emit('Unsqueeze', [name(v), longs(at)])),
        out,
        { axis: at },
      );
    },
    PadV2: ({ inputs: [v] }, { paddings, constantValue = 0 }, out, x) => {
      const ends = [0, 1].flatMap(end => paddings.map((pair: number[]) => pair[end]));
      emit('Pad', [x, longs(...ends), scalar(constantValue, v!.dtype)], out);
    },
    Reshape: ({ outputs }, _a, out, x) => emit('Reshape', [x, longs(...outputs[0]!.shape)], out, { allowzero: 1 }),
    Rsqrt: (_n, _a, out, x) => emit('Reciprocal', [emit('Sqrt', [x])], out),
    Select: (node, _a, out, x, y, z) => {
      // a single condition and zeros are repeated by the operator itself: three passes and a tensor fewer
      const [condition, , zeros] = node.inputs.map((_, i) => repeats(node, i));
      emit('Where', [condition ? name(condition) : x, y, zeros ? scalar(0, zeros.dtype) : z], out);
    },
    Slice: ({ outputs: [v] }, { begin }, out, x) => {
      const from = v!.shape.map((_, i) => [begin].flat()[i] ?? 0);
      emit('Slice', [x, longs(...from), longs(...v!.shape.map((n, i) => from[i] + n))], out);
    },
    SplitV: ({ inputs: [v], outputs }, { axis }, out, x) => {
      const at = axisOf(axis, v!.shape);
      emit('Split', [x, longs(...outputs.map(o => o.shape[at]!))], out, { axis: at });
    },
    Square: (_n, _a, out, x) => emit('Mul', [x, x], out),
    SquaredDifference: (_n, _a, out, x, y) => {
      const d = emit('Sub', [x, y]);
      emit('Mul', [d, d], out);
    },
    Step: (_, { alpha = 0 }, out, x) => {
      const above = emit('Greater', [x, scalar(0)]);
      if (alpha === 0) emit('Cast', [above], out, { to: TYPE.float32 });
      else emit('Where', [above, scalar(1), scalar(alpha)], out);
    },
    TensorScatterUpdate: (_n, _a, out, x, y, z) =>
      emit('ScatterND', [x, emit('Cast', [y], undefined, { to: TYPE.int64 }), z], out),
    Tile: (_, { reps }, out, x) => emit('Tile', [x, longs(...reps)], out),
    TopK: (_, { k, sorted = true }, [values = '', indices = ''], x) => {
      const wide = `x${temporaries++}`; // int64
      emit('TopK', [x, longs(k)], [values, wide], { axis: -1, sorted: Number(sorted) });
      emit('Cast', [wide], [indices], { to: TYPE.int32 });
    },
    Transpose: (_, { perm }, out, x) => emit('Transpose', [x], out, { perm }),
    Unpack: ({ inputs: [v] }, { axis }, out, x) => {
      const at = axisOf(axis, v!.shape);
      const parts = out.map(() => `x${temporaries++}`);
      emit('Split', [x, longs(...out.map(() => 1))], parts, { axis: at });
      for (const [i, part] of parts.entries()) emit('Squeeze', [part, longs(at)], [out[i]!]);
    },
    UnsortedSegmentSum: ({ outputs: [v], inputs: [, ids] }, _a, out, x, y) => {
      const zeros = emit('Expand', [scalar(0, v!.dtype), longs(...v!.shape)]);
      const at = emit('Unsqueeze', [emit('Cast', [y], undefined, { to: TYPE.int64 }), longs(ids!.shape.length)]);
      body.push(
        message(
          1,
          ...[zeros, at, x].map(input => message(1, input)),
          ...[message(2, out[0]!), message(4, 'ScatterND')],
          message(5, message(1, 'reduction'), message(4, 'add'), int(20, 3)),
        ),
      );
    },
    ZerosLike: ({ inputs: [v] }, _a, out) => emit('Expand', [scalar(0, v!.dtype), longs(...v!.shape)], out),
  };
  for (const kernel of ['Sum', 'Mean', 'Max', 'Min'])
    lower[kernel] = (node, { axis, reductionIndices, keepDims }, out, x) => {
      const { shape } = node.inputs[0]!;
      const axes = axesOf(axis ?? reductionIndices, shape);
      const keepdims = { keepdims: Number(!!keepDims), noop_with_empty_axes: 1 };
      const roots = repeats(node, 0);
      const [op, from] = [`Reduce${kernel}${roots ? 'Square' : ''}`, roots ? name(roots) : x];
      // ONNX Runtime adds all numbers to the same few: of a hundred million, percents are lost. So by rows first.
      const size = sizeOf(shape);
      const width = [...Array(MAX_TERMS + 1).keys()].findLast(n => size % n === 0) ?? 1;
      if (kernel !== 'Sum' || size <= MAX_TERMS || axes.length < shape.length || width < 32)
        emit(op, [from, longs(...axes)], out, keepdims);
      else {
        const rows = emit('Reshape', [from, longs(size / width, width)]);
        const sums = emit(op, [rows, longs(1)], undefined, { keepdims: 0 });
        const total = emit('ReduceSum', [sums, longs(0)], undefined, { keepdims: 0 });
        emit('Reshape', [total, longs(...node.outputs[0]!.shape)], out, { allowzero: 1 });
      }
    };

  // What only such operators take that do without is not made.
  const uses = new Map<Value, Node[]>();
  for (const node of nodes) for (const x of node.inputs) uses.set(x, [...(uses.get(x) ?? []), node]);
  const skipped = ({ outputs: [v] }: Node) => {
    const without = (x: Node) => x.inputs.every((input, i) => input !== v || repeats(x, i));
    return uses.has(v!) && !named.has(v!) && uses.get(v!)!.every(without);
  };
  for (const node of nodes) {
    if (skipped(node)) continue;
    const outs = node.outputs.map(name);
    at = node.where ?? '';
    if (node.kernel === 'Uniform') {
      drawn.push(node);
      inputs.set(outs[0]!, node.outputs[0]!);
      continue;
    }
    const [same, more] = [SAME[node.kernel], lower[node.kernel]];
    const ins = node.inputs.map(name);
    if (same) emit(same, ins, outs);
    else if (more) more(node, node.attrs, outs, ins[0] ?? '', ins[1] ?? '', ins[2] ?? '');
    else throw new UnknownKernel(node.kernel);
  }
  for (const [as, value] of results) if (name(value) !== as) emit('Identity', [name(value)], [as]);
  if (!inOrder) emit('SequenceEmpty', [], [NO_TENSOR]);
  const sequence = message(2, message(4, message(1, message(1, int(1, TYPE.float32)))));

  const typed = (field: number, as: string, { dtype, shape }: Value) => {
    const dims = message(2, ...shape.map(size => message(1, int(1, size))));
    return message(field, message(1, as), message(2, message(1, int(1, TYPE[dtype]), dims)));
  };
  const graph = message(
    7,
    ...[...(inOrder ? body : body.toReversed()), message(2, 'recording'), ...constants.values()],
    ...[...inputs].map(([as, value]) => typed(11, as, value)),
    ...(inOrder ? [] : [message(12, message(1, NO_TENSOR), sequence)]),
    ...results.map(([as, value]) => typed(12, as, value)),
  );
  const opset = (domain: string, version: number) => message(8, message(1, domain), int(2, version));
  const bytes = Buffer.concat([int(1, IR_VERSION), graph, opset('', OPSET), opset('com.microsoft', 1)]);
  return { bytes: new Uint8Array(bytes), inputs: [...inputs.values()], drawn };
}
