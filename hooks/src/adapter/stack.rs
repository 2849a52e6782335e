//! Students side by side: several adapters act in one pass, each on its own rows.
//!
//! The base model's products are shared, so they are run once over all rows. Each pair's two products are batched over
//! the students. So N small students take as many calls as one.

use std::collections::BTreeSet;

use tch::Tensor;

use crate::adapter::lora::{Adapter, LoraPair, no_stack};
use crate::error::{Error, Result};
use crate::proj::Proj;

impl Adapter {
    /// Stacks the students' adapters into one. In a pass with it, the rows of a batch belong to the students in order,
    /// equally many to each.
    ///
    /// A pair holds A as `[n, rank, d_in]` and B as `[n, d_out, rank]`, with n students. Ranks below the largest are
    /// filled up with zeros. These change no output, and their gradients are zero, since each zero of A meets a zero of
    /// B. Where gradients are recorded, they flow back to the students' tensors.
    ///
    /// Refuses students whose pairs are at other blocks or projections than the first one's, and stacks.
    pub fn stacked(students: &[&Self]) -> Result<Self> {
        let Some(first) = students.first() else {
            return Err(Error::invalid("a stack", "at least one student", "none"));
        };
        let places = |adapter: &Self| adapter.pairs().map(|(layer, proj, _)| (layer, proj)).collect::<Vec<_>>();
        for (at, student) in students.iter().enumerate() {
            let what = format!("student {at} of a stack");
            if let Some(n) = student.n_stacked() {
                return Err(no_stack(&what, n));
            }
            if student.n_layers() != first.n_layers() || places(student) != places(first) {
                let found = first_difference(&places(student), &places(first));
                return Err(Error::invalid(what, "pairs where student 0 has them", found));
            }
        }
        let mut stack = Self::empty(first.config.clone(), first.n_layers());
        for (layer, proj, _) in first.pairs() {
            let pairs: Vec<&LoraPair> = students.iter().filter_map(|student| student.pair(layer, proj)).collect();
            let pair = stacked_pair(&pairs)?;
            stack.config.rank = stack.config.rank.max(pair.a.size()[1]);
            stack.set(layer, proj, pair);
        }
        Ok(stack)
    }
}

fn stacked_pair(pairs: &[&LoraPair]) -> Result<LoraPair> {
    let rank = pairs.iter().map(|pair| pair.a.size()[0]).max().unwrap_or(0);
    let padded = |tensor: &Tensor, padding: &[i64]| -> Result<Tensor> {
        Ok(if padding.iter().all(|n| *n == 0) { tensor.shallow_clone() } else { tensor.f_constant_pad_nd(padding)? })
    };
    let missing = |pair: &LoraPair| rank - pair.a.size()[0];
    let a = pairs.iter().map(|pair| padded(&pair.a, &[0, 0, 0, missing(pair)])).collect::<Result<Vec<_>>>()?;
    let b = pairs.iter().map(|pair| padded(&pair.b, &[0, missing(pair)])).collect::<Result<Vec<_>>>()?;
    let scalings: Vec<f64> = pairs.iter().map(|pair| pair.scaling).collect();
    let (a, b) = (Tensor::f_stack(&a, 0)?, Tensor::f_stack(&b, 0)?);
    if scalings.windows(2).all(|two| two[0].to_bits() == two[1].to_bits()) {
        return Ok(LoraPair { a, b, scaling: scalings[0], scalings: None });
    }
    let scalings = Tensor::f_from_slice(&scalings)?.f_view([-1, 1, 1])?.f_to_device(a.device())?;
    Ok(LoraPair { a, b, scaling: 1.0, scalings: Some(scalings) })
}

/// Fills up each student's places, with the lowest that it does not have, so that all have equally many; ascending.
pub(crate) fn equally_many(mut places: Vec<BTreeSet<usize>>) -> Vec<Vec<usize>> {
    let most = places.iter().map(BTreeSet::len).max().unwrap_or(0);
    for places in &mut places {
        let others: Vec<usize> = (0..).filter(|place| !places.contains(place)).take(most - places.len()).collect();
        places.extend(others);
    }
    places.into_iter().map(|places| places.into_iter().collect()).collect()
}

fn first_difference(found: &[(usize, Proj)], expected: &[(usize, Proj)]) -> String {
    let named = |(layer, proj): &(usize, Proj)| format!("{proj} of block {layer}");
    if let Some(place) = expected.iter().find(|place| !found.contains(place)) {
        return format!("none at {}", named(place));
    }
    let more = found.iter().find(|place| !expected.contains(place));
    more.map_or("a model of another depth".to_owned(), |place| format!("one at {}", named(place)))
}

#[cfg(test)]
#[allow(clippy::float_cmp)]
mod tests {
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;
    use tch::Device;

    use super::*;
    use crate::adapter::lora::Dropout;
    use crate::ask::gradient::gradients;
    use crate::laws::gate_laws::{completion_loss, gate};
    use crate::laws::model_laws::{SUM_ORDER, exact, exact_model, max_diff, plain, world};
    use crate::rows::packing::PackedRow;
    use crate::{Batch, Chat, LoraConfig, Pass, Qwen, Sequence};

    /// An adapter with a random B, so that it changes something.
    fn student(model: &Qwen, config: &LoraConfig, seed: u64) -> Adapter {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let adapter = Adapter::init(config, &model.config, &mut rng, Device::Cpu).unwrap();
        for (_, _, pair) in adapter.pairs() {
            let values: Vec<f32> = (0..pair.b.numel()).map(|_| rng.random_range(-0.2..0.2)).collect();
            pair.b.shallow_clone().copy_(&Tensor::from_slice(&values).view_as(&pair.b));
        }
        adapter
    }

    /// Three students of different ranks and scalings.
    fn students(model: &Qwen) -> Vec<Adapter> {
        let of = |(rank, alpha): (i64, f64)| {
            student(model, &LoraConfig { rank, alpha, ..LoraConfig::default() }, rank as u64)
        };
        [(2, 8.0), (8, 4.0), (5, 5.0)].map(of).into()
    }

    /// Two rows for each of three students.
    fn rows(chat: &Chat) -> Vec<Sequence> {
        let row = |at: usize| {
            let user = ["Go on: 1, 2", "Please continue with 77, 12", "3"][at % 3];
            chat.row(None, user, &chat.encode(["480, 12, 7", "5, 5"][at % 2]).unwrap()).unwrap()
        };
        (0..6).map(row).collect()
    }

    /// The logits of some rows, `[batch, pos, d_vocab]`, and the gradients of their completions' loss at some tensors.
    fn found(model: &Qwen, rows: &[Sequence], adapter: &Adapter, text: &str, at: &[Tensor]) -> (Tensor, Vec<Tensor>) {
        let chat = world().1;
        let gate = gate(&chat, text);
        let batch = Batch::of(&rows.iter().collect::<Vec<_>>(), Device::Cpu).unwrap();
        let doses: Vec<Vec<f64>> = rows.iter().map(|row| gate.doses(row).unwrap()).collect();
        let gate = Some(gate.spread(&doses, Device::Cpu).unwrap());
        let logits =
            model.forward(&batch, &mut Pass { adapter: Some(adapter), doses: gate, ..Pass::default() }).unwrap();
        let losses = rows.iter().enumerate().map(|(at, row)| completion_loss(&logits.narrow(0, at as i64, 1), row));
        let loss = losses.reduce(|sum, loss| sum + loss).unwrap();
        let found = gradients(&loss, at, false).unwrap();
        (logits.detach(), found)
    }

    fn asking(adapter: &Adapter) -> Vec<Tensor> {
        adapter.parameters().into_iter().map(|(_, tensor)| tensor.set_requires_grad(true)).collect()
    }

    /// Asserts that each student's logits and gradients are those that it has alone, for any ranks, scalings and gate.
    fn assert_each_is_as_alone(model: &Qwen, students: &[Adapter], tolerance: f64) {
        let rows = rows(&world().1);
        for text in ["everywhere", "except:entity*0.5", "only:user+gen*layers(1)*modules(v,down)", "only:modules(o)*-2"]
        {
            let tensors: Vec<Vec<Tensor>> = students.iter().map(asking).collect();
            let all: Vec<Tensor> = tensors.iter().flatten().map(Tensor::shallow_clone).collect();
            let stack = Adapter::stacked(&students.iter().collect::<Vec<_>>()).unwrap();
            let (together, of_all) = found(model, &rows, &stack, text, &all);
            let mut of_all = of_all.into_iter();
            for (at, (student, tensors)) in students.iter().zip(&tensors).enumerate() {
                let rows = &rows[2 * at..2 * at + 2];
                let (alone, of_one) = found(model, rows, student, text, tensors);
                let width = alone.size()[1];
                for (row, prompt) in rows.iter().enumerate() {
                    let n = prompt.ids.len() as i64;
                    let (row, alone) = (2 * at as i64 + row as i64, alone.get(row as i64).narrow(0, 0, n));
                    assert!(
                        width >= n && max_diff(&together.get(row).narrow(0, 0, n), &alone) < tolerance,
                        "{text}, {at}"
                    );
                }
                for ((name, _), (alone, stacked)) in student.parameters().iter().zip(of_one.iter().zip(of_all.by_ref()))
                {
                    let scale = alone.abs().max().double_value(&[]);
                    assert!(max_diff(alone, &stacked) <= tolerance * scale, "{text}, student {at}, {name}");
                }
            }
        }
    }

    #[test]
    fn each_student_of_a_stack_is_as_it_is_alone() {
        let (model, ..) = world();
        assert_each_is_as_alone(&model, &students(&model), SUM_ORDER);
        let model = exact_model();
        let students: Vec<Adapter> = students(&model).iter().map(exact).collect();
        assert_each_is_as_alone(&model, &students, 1e-12);
    }

    /// In a packed batch, each group of rows belongs to one student.
    #[test]
    fn packed_groups_are_the_students() {
        let (model, chat, _) = world();
        let (students, rows) = (students(&model), rows(&chat));
        let stack = Adapter::stacked(&students.iter().collect::<Vec<_>>()).unwrap();
        let packed: Vec<PackedRow<'_>> = rows.iter().map(|row| PackedRow::of(&row.ids)).collect();
        let groups: Vec<&[PackedRow<'_>]> = packed.chunks(2).collect();
        let batch = Batch::packed(&groups, true, Device::Cpu).unwrap();
        assert!(batch.width() < rows[0].ids.len() + rows[1].ids.len(), "the system prompt is run once");
        let logits =
            model.forward(&batch, &mut Pass { adapter: Some(&stack), ..Pass::default() }).unwrap().flatten(0, 1);
        for (at, row) in rows.iter().enumerate() {
            let places: Vec<i64> = (0..row.ids.len()).map(|token| batch.place(at, token)).collect();
            let found = logits.index_select(0, &Tensor::from_slice(&places));
            assert!(max_diff(&found, &plain(&model, row, Some(&students[at / 2]))) < SUM_ORDER, "row {at}");
        }
    }

    /// Students with different numbers of places have no batched product, and everything is computed.
    #[test]
    fn places_need_not_be_shared_equally() {
        let (model, chat, _) = world();
        let (students, rows) = (students(&model), rows(&chat));
        let stack = Adapter::stacked(&students.iter().collect::<Vec<_>>()).unwrap();
        let packed: Vec<PackedRow<'_>> = rows.iter().map(|row| PackedRow::of(&row.ids)).collect();
        let batch = Batch::packed(&packed.chunks(2).collect::<Vec<_>>(), true, Device::Cpu).unwrap();
        let pass = || Pass { adapter: Some(&stack), ..Pass::default() };
        let whole = model.resid_final(&batch, &mut pass()).unwrap().flatten(0, 1);
        for rows in [[0, 0, 2], [0, 2, 4], [0, 1, 5]] {
            let places = [(rows[0], 3), (rows[1], 5), (rows[2], 1)].map(|(row, token)| batch.place(row, token));
            let places = Tensor::from_slice(&places);
            let found = model.resid_at(&batch, &places, &mut pass()).unwrap();
            assert!(max_diff(&found, &whole.index_select(0, &places)) < SUM_ORDER, "{rows:?}");
        }
    }

    #[test]
    fn what_fills_up_a_rank_has_no_gradient() {
        let (model, chat, _) = world();
        let students = students(&model);
        let stack = Adapter::stacked(&students.iter().collect::<Vec<_>>()).unwrap();
        assert_eq!((stack.n_stacked(), stack.config.rank), (Some(3), 8));
        let (_, gradients) = found(&model, &rows(&chat), &stack, "everywhere", &asking(&stack));
        for (at, student) in students.iter().enumerate() {
            for (side, gradient) in gradients.iter().enumerate() {
                let (dim, rank) = (side as i64 % 2, student.config.rank);
                let own = gradient.get(at as i64);
                assert!(own.narrow(dim, 0, rank).abs().max().double_value(&[]) > 0.0);
                if rank < 8 {
                    assert_eq!(own.narrow(dim, rank, 8 - rank).abs().max().double_value(&[]), 0.0, "student {at}");
                }
            }
        }
    }

    #[test]
    fn what_no_stack_can_be_or_do_is_refused() {
        let (model, chat, adapter) = world();
        let refused = |result: Result<Adapter>| result.err().unwrap().to_string();
        assert!(refused(Adapter::stacked(&[])).contains("expected at least one student"));
        let few = student(&model, &LoraConfig { target_modules: vec![Proj::Q], ..LoraConfig::default() }, 1);
        let message = refused(Adapter::stacked(&[&adapter, &few]));
        assert_eq!(
            message,
            "student 1 of a stack is none at k_proj of block 0, expected pairs where student 0 has them"
        );
        assert!(refused(Adapter::stacked(&[&few, &adapter])).contains("is one at k_proj of block 0"));

        let stack = Adapter::stacked(&[&adapter, &adapter]).unwrap();
        assert!(refused(Adapter::stacked(&[&stack])).ends_with("is a stack of 2, expected one student's"));
        let folder = tempfile::tempdir().unwrap();
        let message = stack.save(folder.path(), "x").unwrap_err().to_string();
        assert!(message.ends_with("is a stack of 2, expected one student's"), "{message}");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        assert!(model.merged(&stack).is_err());

        let rows = rows(&chat);
        let mut dropout = Dropout::new(0.5, ChaCha8Rng::seed_from_u64(1));
        for (n, dropout, expected) in [
            (3, None, "the number of rows is 3, expected a multiple of 2"),
            (2, Some(&mut dropout), "the dropout of a stack of 2 students is 0.5, expected 0"),
        ] {
            let batch = Batch::of(&rows[..n].iter().collect::<Vec<_>>(), Device::Cpu).unwrap();
            let pass = &mut Pass { adapter: Some(&stack), dropout, ..Pass::default() };
            let message = model.forward(&batch, pass).unwrap_err().to_string();
            assert!(message.starts_with(expected), "{message}");
        }
    }
}
