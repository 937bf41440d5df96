#include <algorithm>
#include <bit>
#include <memory>

#include "stretto/core/rng.h"
#include "support/ops_fixture.h"

namespace stretto::test {
namespace {

class OptimizerTest : public OpsTest {};
STRETTO_ALL_SETTINGS(OptimizerTest);

// Parameters of bf16, which are rounded.
class Bf16OptimizerTest : public OptimizerTest {};
INSTANTIATE_TEST_SUITE_P(, Bf16OptimizerTest,
                         ::testing::ValuesIn(SettingsThat([](const Setting& s) {
                           return s.dtype == DType::kBF16;
                         })),
                         SettingName);
// Moments may be kept in bf16.
class Bf16MomentsTest : public OptimizerTest {};
INSTANTIATE_TEST_SUITE_P(, Bf16MomentsTest, ::testing::ValuesIn(SettingsThat([](const Setting& s) {
                           return s.dtype != DType::kF64;
                         })),
                         SettingName);

Values Scalars(bool skip) {
  Values scalars(StepScalars::kCount, 0.0);
  scalars[StepScalars::kScale] = 0.125;
  scalars[StepScalars::kSkip] = skip;
  return scalars;
}

// How the optimizer's state is kept.
struct Kept {
  bool bf16_moments = false, masters = false;
};
std::vector<Kept> AllKept(DType dtype) {
  if (dtype == DType::kF64) return {{}};
  if (dtype == DType::kF32) return {{}, {true, false}};
  return {{}, {true, false}, {false, true}, {true, true}};
}

// `elements` of a parameter named "p<seed>", from `first` on. Everything begins `offset` elements
// behind an aligned address and has further elements around it that must stay as they are.
struct Shard {
  static constexpr int64_t kGuard = 3;
  int64_t elements = 0, offset = 0;
  uint64_t first = 0;
  unsigned seed = 1;
  bool decay = true;
};

class Update {
 public:
  Update(const Runner& run, Kept kept, std::vector<Shard> shards, double grad_scale = 5.0)
      : context_(run.context()),
        kept_(kept),
        shards_(std::move(shards)),
        scalars_(DType::kF64, {StepScalars::kCount}, Scalars(false)) {
    const DType moments = kept.bf16_moments ? DType::kBF16 : run.wide();
    std::vector<OptimizerItem> items;
    for (const Shard& s : shards_) {
      // Of the whole parameter, so that a part has the values that the whole has there.
      const auto make = [&](DType dtype, unsigned seed, double scale) {
        const Values all = Random(static_cast<int64_t>(s.first) + s.elements, 100 * s.seed + seed);
        Values with_guards(static_cast<size_t>(s.offset + s.elements + Shard::kGuard), 77.0);
        for (int64_t i = 0; i < s.elements; ++i) {
          with_guards[static_cast<size_t>(s.offset + i)] =
              scale * all[s.first + static_cast<uint64_t>(i)];
        }
        const auto n = static_cast<int64_t>(with_guards.size());
        return std::make_unique<Buffer>(dtype, std::vector<int64_t>{n}, with_guards);
      };
      param_.push_back(make(run.dtype(), 1, 1));
      grad_.push_back(make(run.wide(), 2, grad_scale));
      m_.push_back(make(moments, 3, 0));
      v_.push_back(make(moments, 4, 0));
      master_.push_back(nullptr);
      if (kept.masters) {
        master_.back() = make(run.wide(), 1, 1);
        master_.back()->Write(param_.back()->Read());
      }
      const auto part = [&](const std::unique_ptr<Buffer>& b) {
        return b == nullptr ? Tensor() : b->view().Rows(s.offset, s.elements);
      };
      items.push_back({.param = part(param_.back()),
                       .grad = part(grad_.back()),
                       .m = part(m_.back()),
                       .v = part(v_.back()),
                       .master = part(master_.back()),
                       .decay = s.decay,
                       .key = Rng(7, "round/p" + std::to_string(s.seed)).key(),
                       .first_element = s.first});
    }
    table_ = OptimizerTable::Create(context_.stream->device(), items).value();
  }

  AdamWArgs Args(int64_t step) const {
    return {.scalars = scalars_, .lr = 0.01, .weight_decay = 0.1, .step = step};
  }
  void Step(const AdamWArgs& args) const { ops::AdamW(context_, table_, args); }
  void Step(int64_t step) const { Step(Args(step)); }
  void Skip() { scalars_.Write(Scalars(true)); }

  const Shard& shard(size_t i) const { return shards_[i]; }
  const OptimizerTable& table() const { return table_; }
  Kept kept() const { return kept_; }
  Values Param(size_t i) const { return Inside(*param_[i], i); }
  Values Grad(size_t i) const { return Inside(*grad_[i], i); }
  Values M(size_t i) const { return Inside(*m_[i], i); }
  Values V(size_t i) const { return Inside(*v_[i], i); }
  Values Master(size_t i) const { return Inside(*master_[i], i); }
  void WriteParam(size_t i, double x) { Fill(*param_[i], x); }
  void WriteGrad(size_t i, double x) { Fill(*grad_[i], x); }
  void WriteV(size_t i, double x) { Fill(*v_[i], x); }

 private:
  Values Inside(const Buffer& buffer, size_t i) const {
    const Values all = buffer.Read();
    const auto begin = all.begin() + shards_[i].offset, end = begin + shards_[i].elements;
    for (auto it = all.begin(); it != begin; ++it) EXPECT_EQ(*it, all.front()) << "in front";
    for (auto it = end; it != all.end(); ++it) EXPECT_EQ(*it, all.back()) << "behind";
    if (!all.empty()) {
      EXPECT_EQ(all.back(), 77) << "behind";
    }
    return Values(begin, end);
  }
  static void Fill(Buffer& buffer, double x) {
    Values values = buffer.Read();
    std::fill(values.begin(), values.end() - Shard::kGuard, x);
    buffer.Write(values);
  }

  ops::Context context_;
  Kept kept_;
  std::vector<Shard> shards_;
  std::vector<std::unique_ptr<Buffer>> param_, grad_, m_, v_, master_;
  Buffer scalars_;
  OptimizerTable table_;
};

// Of every kind: less than a vector, several chunks, odd ends, odd addresses, parts of parameters.
std::vector<Shard> OddShards() {
  return {{1, 0, 0, 1},
          {37, 1, 0, 2, false},
          {OptimizerChunk::kElements, 0, 0, 3},
          {0, 0, 5, 4},
          {2 * OptimizerChunk::kElements + 1003, 0, 8, 5},
          {OptimizerChunk::kElements / 2 + 7, 2, 3, 6, false},
          {5001, 0, 17, 7}};
}

TEST_P(OptimizerTest, AddSumSquaresMatchesReference) {
  const Update update(run, AllKept(run.dtype()).front(), OddShards());
  Buffer total(DType::kF64, {1}, Values{7});
  double expected = 0;
  for (size_t i = 0; i < OddShards().size(); ++i) {
    for (double g : update.Grad(i)) expected += g * g;
  }
  for (int times = 1; times <= 2; ++times) {
    ops::AddSumSquares(c, total, update.table());
    run.ExpectOk();
    EXPECT_NEAR(total.Read()[0], 7 + times * expected, 1e-10 * expected);
  }
}

TEST_P(OptimizerTest, AddSumSquaresDoesNotDependOnThreads) {
  const std::vector<Shard> shards = {{200003, 0, 0, 1}, {77, 0, 0, 2}};
  const Update update(run, AllKept(run.dtype()).front(), shards);
  Runner one(run.serial());
  Buffer a(DType::kF64, {1}, Values{0}), b(DType::kF64, {1}, Values{0});
  ops::AddSumSquares(c, a, update.table());
  run.ExpectOk();
  ops::AddSumSquares(one.context(), b, update.table());
  one.ExpectOk();
  EXPECT_EQ(a.Read()[0], b.Read()[0]);
  EXPECT_GT(a.Read()[0], 0);
}

Values Prepared(Values scalars, double max_norm, double max_loss) {
  Runner run;
  scalars.resize(StepScalars::kCount);
  Buffer s(DType::kF64, {StepScalars::kCount}, scalars);
  ops::PrepareStep(run.context(), s, max_norm, max_loss);
  run.ExpectOk();
  return s.Read();
}

TEST(PrepareStepTest, ScalesAndClips) {
  Values s = Prepared({30, 10, 400}, 0, 0);
  EXPECT_DOUBLE_EQ(s[StepScalars::kGradNorm], 2);
  EXPECT_DOUBLE_EQ(s[StepScalars::kScale], 0.1);
  EXPECT_EQ(s[StepScalars::kSkip], 0);
  s = Prepared({30, 10, 400}, 0.5, 0);
  EXPECT_NEAR(s[StepScalars::kScale], 0.025, 1e-7);
  s = Prepared({30, 10, 400}, 5, 0);
  EXPECT_DOUBLE_EQ(s[StepScalars::kScale], 0.1) << "a small norm is not raised";
}

TEST(PrepareStepTest, SkipsWhatMustNotBeApplied) {
  EXPECT_EQ(Prepared({NAN, 10, 400}, 1, 0)[StepScalars::kSkip], 1);
  EXPECT_EQ(Prepared({30, 10, INFINITY}, 1, 0)[StepScalars::kSkip], 1);
  EXPECT_EQ(Prepared({0, 0, 0}, 1, 0)[StepScalars::kSkip], 1);
  EXPECT_EQ(Prepared({30, 10, 400}, 1, 2.9)[StepScalars::kSkip], 1);
  EXPECT_EQ(Prepared({30, 10, 400}, 1, 3.1)[StepScalars::kSkip], 0);
}

// bf16 from a number by 16 random bits, as AdamWArgs has it.
double Rounded(double x, uint32_t random) {
  const uint32_t u = std::bit_cast<uint32_t>(static_cast<float>(x)) + (random & 0xffffu);
  return std::bit_cast<float>(u & 0xffff0000u);
}

// What AdamW makes of one shard, in double precision but for what is kept in bf16.
struct Reference {
  Values w, m, v, g;

  void Step(const Update& update, size_t shard, DType dtype, int64_t step) {
    const Shard& s = update.shard(shard);
    const Rng rng(7, "round/p" + std::to_string(s.seed), static_cast<uint64_t>(step));
    for (size_t i = 0; i < w.size(); ++i) {
      const double scaled = 0.125 * g[i];
      m[i] = 0.9 * m[i] + (1 - 0.9) * scaled;
      v[i] = 0.95 * v[i] + (1 - 0.95) * scaled * scaled;
      const double m_hat = m[i] / (1 - std::pow(0.9, step));
      const double v_hat = v[i] / (1 - std::pow(0.95, step));
      w[i] -= 0.01 * ((s.decay ? 0.1 : 0) * w[i] + m_hat / (std::sqrt(v_hat) + 1e-8));
      const uint64_t e = s.first + i;
      if (update.kept().bf16_moments) {
        const uint32_t word = rng.Words(2 * (e / 4))[e % 4];
        m[i] = Rounded(m[i], word);
        v[i] = Rounded(v[i], word >> 16);
      }
      if (dtype == DType::kBF16 && !update.kept().masters) {
        w[i] = Rounded(w[i], rng.Words(2 * (e / 4) + 1)[e % 4]);
      }
    }
  }
};

// Numbers that are rounded stochastically are the same but where arithmetic in f32 instead of
// double precision has moved them across the random threshold; then they are neighbours.
::testing::AssertionResult Same(const Values& actual, const Values& expected, bool random,
                                double tolerance) {
  if (!random) return Near(actual, expected, tolerance);
  size_t moved = 0;
  for (size_t i = 0; i < actual.size(); ++i) moved += actual[i] != expected[i] ? 1 : 0;
  if (moved > actual.size() / 200 + 1) {
    return ::testing::AssertionFailure() << moved << " of " << actual.size() << " differ";
  }
  return Near(actual, expected, 0x1p-6);
}

TEST_P(OptimizerTest, AdamWMatchesReference) {
  for (const Kept kept : AllKept(run.dtype())) {
    SCOPED_TRACE(::testing::Message()
                 << "bf16 moments " << kept.bf16_moments << ", masters " << kept.masters);
    const Update update(run, kept, OddShards());
    std::vector<Reference> references;
    for (size_t k = 0; k < OddShards().size(); ++k) {
      const Values g = update.Grad(k), zero(g.size(), 0.0);
      references.push_back({update.Param(k), zero, zero, g});
    }
    for (int step = 1; step <= 3; ++step) {
      update.Step(step);
      for (size_t k = 0; k < references.size(); ++k) {
        references[k].Step(update, k, run.dtype(), step);
      }
    }
    run.ExpectOk();
    const bool random_param = run.dtype() == DType::kBF16 && !kept.masters;
    for (size_t k = 0; k < references.size(); ++k) {
      SCOPED_TRACE(::testing::Message() << "shard " << k);
      // Stochastic moments that came out differently move what is updated as well.
      const double least = kept.bf16_moments ? 1e-4 : 0;
      EXPECT_TRUE(
          Same(update.Param(k), references[k].w, random_param, std::max(least, run.tolerance())));
      EXPECT_TRUE(Same(update.M(k), references[k].m, kept.bf16_moments, run.wide_tolerance()));
      EXPECT_TRUE(Same(update.V(k), references[k].v, kept.bf16_moments, run.wide_tolerance()));
      if (kept.masters) {
        EXPECT_TRUE(Near(update.Master(k), references[k].w, std::max(least, run.wide_tolerance())));
      }
    }
  }
}

// Two ranks have the bits of one, wherever the rows are cut.
TEST_P(OptimizerTest, APartHasTheBitsOfTheWhole) {
  for (const Kept kept : AllKept(run.dtype())) {
    const int64_t n = OptimizerChunk::kElements + 1001;
    const Update whole(run, kept, {{n, 0, 0, 1}});
    const Update parts(run, kept, {{333, 0, 0, 1}, {n - 333, 1, 333, 1}});
    for (int step = 1; step <= 3; ++step) {
      whole.Step(step);
      parts.Step(step);
    }
    run.ExpectOk();
    const auto joined = [](Values a, const Values& b) {
      a.insert(a.end(), b.begin(), b.end());
      return a;
    };
    EXPECT_EQ(joined(parts.Param(0), parts.Param(1)), whole.Param(0));
    EXPECT_EQ(joined(parts.M(0), parts.M(1)), whole.M(0));
    EXPECT_EQ(joined(parts.V(0), parts.V(1)), whole.V(0));
  }
}

// The bits are those of Rng, on every backend: with these operands arithmetic is exact.
TEST_P(Bf16OptimizerTest, RandomBitsAreThoseOfTheGenerator) {
  for (const uint64_t first : {uint64_t{0}, uint64_t{6}, (uint64_t{1} << 34) + 4}) {
    const int64_t n = 203, step = 5;
    const Update values(run, {true, false}, {{n, 0, 0, 1}}, 0.0);  // gradients of zero
    const Rng rng(7, "round/p1", step);
    // Moments of the wanted size from one gradient.
    Buffer param(DType::kBF16, {n}, values.Param(0)), grad(DType::kF32, {n}, Random(n, 3));
    Buffer m(DType::kBF16, {n}, Values(n, 0.0)), v(DType::kBF16, {n}, Values(n, 0.0));
    Buffer scalars(DType::kF64, {StepScalars::kCount}, Scalars(false));
    const auto table = OptimizerTable::Create(c.stream->device(), {{.param = param,
                                                                    .grad = grad,
                                                                    .m = m,
                                                                    .v = v,
                                                                    .decay = true,
                                                                    .key = Rng(7, "round/p1").key(),
                                                                    .first_element = first}});
    ASSERT_TRUE(table.ok()) << table.status();
    // w * (1 - 2^-9) is exact in f32, and so are halves of the gradient.
    const Values w = param.Read(), g = grad.Read();
    ops::AdamW(c, *table,
               {.scalars = scalars,
                .lr = 0x1p-9,
                .beta1 = 0.5,
                .beta2 = 0.5,
                .eps = 0x1p120,
                .weight_decay = 1,
                .step = step});
    run.ExpectOk();
    const Values new_w = param.Read(), new_m = m.Read(), new_v = v.Read();
    for (int64_t i = 0; i < n; ++i) {
      const uint64_t e = first + static_cast<uint64_t>(i);
      const uint32_t word = rng.Words(2 * (e / 4))[e % 4];
      const auto scaled = static_cast<float>(g[i]) * 0.125f;
      ASSERT_EQ(new_m[i], Rounded(scaled * 0.5f, word)) << i;
      ASSERT_EQ(new_v[i], Rounded(scaled * scaled * 0.5f, word >> 16)) << i;
      ASSERT_EQ(new_w[i], Rounded(w[i] * (1 - 0x1p-9), rng.Words(2 * (e / 4) + 1)[e % 4])) << i;
    }
  }
}

// The mean over many elements, parameters and steps is what was rounded.
TEST_P(Bf16OptimizerTest, StochasticRoundingHasNoBias) {
  std::vector<Shard> shards;
  constexpr int64_t kElements = 1000;
  for (unsigned k = 0; k < 16; ++k) shards.push_back({kElements, 0, 3, k + 1});
  for (const double fraction : {0.03, 0.5, 0.8}) {
    double m_sum = 0, v_sum = 0, w_sum = 0;
    int64_t count = 0;
    // 1 + fraction of the step to the next bf16 number, as w * (1 - lr), m / 2 and v / 2.
    constexpr double kUlp = 0x1p-7;
    const double x = static_cast<float>(1 + fraction * kUlp);
    for (int64_t step = 1; step <= 4; ++step) {
      Update update(run, {true, false}, shards);
      for (size_t k = 0; k < shards.size(); ++k) {
        update.WriteParam(k, 1 + kUlp);
        update.WriteGrad(k, 8 * std::sqrt(2 * x));  // scaled by 1/8
      }
      AdamWArgs args = update.Args(step);
      args.beta1 = args.beta2 = 0.5;
      args.eps = 0x1p100;
      args.weight_decay = 1;
      args.lr = 1 - x / (1 + kUlp);
      update.Step(args);
      run.ExpectOk();
      for (size_t k = 0; k < shards.size(); ++k) {
        const Values m = update.M(k), v = update.V(k), w = update.Param(k);
        for (size_t i = 0; i < m.size(); ++i) {
          ASSERT_TRUE(v[i] == 1 || v[i] == 1 + kUlp) << v[i];
          ASSERT_TRUE(w[i] == 1 || w[i] == 1 + kUlp) << w[i];
          m_sum += m[i];
          v_sum += v[i];
          w_sum += w[i];
          ++count;
        }
      }
    }
    const auto n = static_cast<double>(count);
    const double sigma = kUlp * std::sqrt(fraction * (1 - fraction) / n);
    EXPECT_NEAR(v_sum / n, x, 4.5 * sigma);
    EXPECT_NEAR(w_sum / n, x, 4.5 * sigma);
    // Between 0.5 and 1 the numbers of bf16 lie half as far apart.
    EXPECT_NEAR(m_sum / n, std::sqrt(2 * x) / 2, 4.5 * kUlp / 4 / std::sqrt(n));
  }
}

// What rounding to nearest would do: nothing, for ever.
TEST_P(Bf16OptimizerTest, SmallUpdatesAreNotLostWithoutMasters) {
  constexpr int64_t kElements = 4096, kSteps = 100;
  constexpr double kRate = 1e-4;  // bf16 numbers around 1 lie 4e-3 and 8e-3 apart
  Update update(run, {false, false}, {{kElements, 0, 0, 1}});
  update.WriteParam(0, 1);
  update.WriteGrad(0, 1);
  Buffer wide(DType::kF32, {kElements}, Values(kElements, 1)), narrow(DType::kBF16, {kElements});
  Buffer grad(DType::kF32, {kElements}, Values(kElements, 1)), m(DType::kF32, {kElements});
  Buffer v(DType::kF32, {kElements});
  m.Write(Values(kElements, 0));
  v.Write(Values(kElements, 0));
  const auto nearest =
      OptimizerTable::Create(c.stream->device(), {{.param = wide, .grad = grad, .m = m, .v = v}});
  ASSERT_TRUE(nearest.ok()) << nearest.status();
  for (int64_t step = 1; step <= kSteps; ++step) {
    AdamWArgs args = update.Args(step);
    args.lr = kRate;
    args.weight_decay = 0;
    update.Step(args);
    ops::AdamW(c, *nearest, args);
    ops::Copy(c, narrow, wide);
    ops::Copy(c, wide, narrow);
  }
  run.ExpectOk();
  double mean = 0;
  for (double w : update.Param(0)) mean += w / kElements;
  EXPECT_NEAR(mean, 1 - kRate * kSteps, 0.05 * kRate * kSteps);
  EXPECT_EQ(narrow.Read(), Values(kElements, 1));
}

// A second moment of bf16 falls to that of smaller gradients; rounded to nearest it would stay.
TEST_P(Bf16MomentsTest, Bf16MomentsFollowTheGradient) {
  constexpr int64_t kElements = 2048, kSteps = 400;
  Update update(run, {true, false}, {{kElements, 0, 0, 1}});
  update.WriteV(0, 1);
  update.WriteGrad(0, 0);
  AdamWArgs args = update.Args(1);
  args.beta2 = 0.999;
  for (args.step = 1; args.step <= kSteps; ++args.step) update.Step(args);
  run.ExpectOk();
  double mean = 0;
  for (double v : update.V(0)) mean += v / kElements;
  const double expected = std::pow(0.999, kSteps);
  EXPECT_NEAR(mean, expected, 0.01 * expected);
  // The control.
  const auto once = static_cast<float>(0.999);
  EXPECT_EQ(static_cast<float>(BFloat16(once)), 1.0f);
}

TEST_P(Bf16MomentsTest, NonFiniteMomentsStaySo) {
  Update update(run, {true, false}, {{11, 0, 0, 1}});
  update.WriteGrad(0, NAN);
  update.Step(1);
  run.ExpectOk();
  for (double m : update.M(0)) EXPECT_TRUE(std::isnan(m));
  Update large(run, {true, false}, {{11, 0, 0, 1}});
  large.WriteGrad(0, 1e30);
  large.Step(1);
  run.ExpectOk();
  for (double v : large.V(0)) EXPECT_EQ(v, INFINITY);
}

TEST_P(OptimizerTest, SkippedStepChangesNothing) {
  for (const Kept kept : AllKept(run.dtype())) {
    Update update(run, kept, OddShards());
    const Values before = update.Param(4);
    update.Skip();
    update.Step(1);
    run.ExpectOk();
    EXPECT_EQ(update.Param(4), before);
    EXPECT_EQ(update.M(4), Values(before.size(), 0.0));
  }
}

TEST_P(OptimizerTest, NothingToUpdateIsFine) {
  const Update update(run, AllKept(run.dtype()).front(), {{0, 0, 0, 1}});
  Buffer total(DType::kF64, {1}, Values{7});
  ops::AddSumSquares(c, total, update.table());
  update.Step(1);
  run.ExpectOk();
  EXPECT_EQ(total.Read()[0], 7);
}

TEST(OptimizerTableTest, RefusesWhatDoesNotFitByName) {
  Buffer::where = Device::Cpu();
  Buffer f32(DType::kF32, {3}), bf16(DType::kBF16, {3}), f64(DType::kF64, {3}),
      longer(DType::kF32, {4}), gaps(DType::kF32, {2, 3}, 1);
  const auto refusal = [](const OptimizerItem& item) {
    return std::string(OptimizerTable::Create(Device::Cpu(), {item}).status().message());
  };
  const auto has = [](const std::string& text, const char* part) {
    return text.find(part) != std::string::npos;
  };
  const OptimizerItem good = {.param = f32, .grad = f32, .m = f32, .v = f32};
  EXPECT_EQ(refusal(good), "");
  OptimizerItem item = good;
  item.grad = bf16;
  EXPECT_TRUE(has(refusal(item), "item 0 of an optimizer table: grad must be f32"));
  item = good;
  item.v = bf16;
  EXPECT_TRUE(has(refusal(item), "m and v must be of one type"));
  item = good;
  item.m = longer;
  EXPECT_TRUE(has(refusal(item), "must have param's shape"));
  item = good;
  item.master = f32;
  EXPECT_TRUE(has(refusal(item), "a master must be f32, beside a bf16 param"));
  item = {.param = gaps, .grad = gaps, .m = gaps, .v = gaps};
  EXPECT_TRUE(has(refusal(item), "contiguous"));
  item = {.param = f64, .grad = f64, .m = bf16, .v = bf16};
  EXPECT_TRUE(has(refusal(item), "f64 for f64 parameters"));
  EXPECT_EQ(OptimizerTable::Bytes({0, 1, OptimizerChunk::kElements + 1}),
            2 * static_cast<int64_t>(sizeof(OptimizerEntry)) +
                3 * static_cast<int64_t>(sizeof(OptimizerChunk)));
}

}  // namespace
}  // namespace stretto::test
