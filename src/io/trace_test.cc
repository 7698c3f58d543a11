#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "annulus/record.h"
#include "annulus/report.h"
#include "io/activity.h"

namespace annulus {
namespace {

using Json = nlohmann::json;

constexpr EventKind kKinds[] = {EventKind::kPlan,  EventKind::kPack,    EventKind::kSend,
                                EventKind::kWait,  EventKind::kCompute, EventKind::kSkip,
                                EventKind::kFinish};

// Two workers, one ring step, every kind of event; the waits begin before the sends do.
std::vector<Event> exchange() {
  std::vector<Event> events;
  for (const int rank : {0, 1}) {
    const std::int64_t late = 1'000'000'000'000'000 + rank * 500;
    const int other = 1 - rank;
    events.push_back({EventKind::kPlan, rank, -1, -1, late, late + 1000, 0, 0});
    events.push_back({EventKind::kPack, rank, -1, -1, late + 1000, late + 3000, 0, 0});
    events.push_back({EventKind::kCompute, rank, 0, rank, late + 3000, late + 9001, 0, 77});
    events.push_back({EventKind::kWait, rank, 1, other, late + 3000, late + 12000, 4096, 0});
    events.push_back({EventKind::kSend, rank, 0, other, late + 4000, late + 8000, 4096, 0});
    events.push_back({EventKind::kSkip, rank, 1, other, late + 12000, late + 12000, 0, 0});
    events.push_back({EventKind::kFinish, rank, -1, -1, late + 12000, late + 14000, 0, 0});
  }
  return events;
}

Json parsed(const std::vector<Event>& events, const std::string& title = "two workers") {
  return Json::parse(trace_json(events, title));
}

std::vector<Json> of_phase(const Json& trace, const std::string& phase) {
  std::vector<Json> found;
  for (const Json& entry : trace.at("traceEvents")) {
    if (entry.at("ph") == phase) found.push_back(entry);
  }
  return found;
}

bool holds(const Json& slice, const Json& point) {
  const double begin = slice.at("ts");
  const double at = point.at("ts");
  return slice.at("pid") == point.at("pid") && slice.at("tid") == point.at("tid") && begin <= at &&
         at < begin + slice.at("dur").get<double>();
}

TEST(TraceJson, IsValidWithoutEvents) {
  const Json trace = parsed({}, "nothing");
  EXPECT_TRUE(trace.at("traceEvents").empty());
  EXPECT_EQ(trace.at("otherData").at("title"), "nothing");
}

TEST(TraceJson, HasOneSlicePerEventOfEveryKind) {
  const std::vector<Event> events = exchange();
  std::map<std::string, int> slices;
  for (const Json& slice : of_phase(parsed(events), "X")) ++slices[slice.at("cat")];
  for (const EventKind kind : kKinds) EXPECT_EQ(slices[std::string(name(kind))], 2) << name(kind);
}

TEST(TraceJson, CountsMicrosecondsFromTheFirstEvent) {
  for (const Json& slice : of_phase(parsed(exchange()), "X")) {
    if (slice.at("cat") != "compute" || slice.at("pid") != 1) continue;
    EXPECT_DOUBLE_EQ(slice.at("ts"), 3.0);
    EXPECT_DOUBLE_EQ(slice.at("dur"), 6.001);
    EXPECT_EQ(slice.at("name"), "compute 0");
    EXPECT_EQ(slice.at("args"), Json({{"step", 0}, {"keys_of", 0}, {"pairs", 77}}));
  }
}

TEST(TraceJson, NamesEachRankAndThreadOnce) {
  const Json trace = parsed(exchange());
  std::map<std::string, std::multiset<std::string>> names;
  for (const Json& entry : of_phase(trace, "M")) {
    if (!entry.at("args").contains("name")) continue;
    names[entry.at("name")].insert(entry.at("args").at("name"));
    EXPECT_GT(entry.at("pid"), 0);
    EXPECT_GT(entry.at("tid"), 0);
  }
  EXPECT_EQ(names["process_name"], (std::multiset<std::string>{"rank 0", "rank 1"}));
  EXPECT_EQ(names["thread_name"].count("compute"), 2U);
  EXPECT_EQ(names["thread_name"].count("comm"), 4U);  // the wait overlaps the send
}

TEST(TraceJson, SlicesOfOneThreadNeverOverlap) {
  std::map<std::pair<int, int>, double> ends;
  for (const Json& slice : of_phase(parsed(exchange()), "X")) {
    double& end = ends[{slice.at("pid"), slice.at("tid")}];
    EXPECT_GE(slice.at("ts").get<double>(), end - 1e-9);
    end = slice.at("ts").get<double>() + slice.at("dur").get<double>();
  }
}

TEST(TraceJson, EachArrowLeadsFromASendToTheWaitOfItsPeer) {
  const Json trace = parsed(exchange());
  const std::vector<Json> starts = of_phase(trace, "s");
  const std::vector<Json> ends = of_phase(trace, "f");
  const std::vector<Json> slices = of_phase(trace, "X");
  ASSERT_EQ(starts.size(), 2U);
  ASSERT_EQ(ends.size(), 2U);
  for (const Json& start : starts) {
    const auto end = std::find_if(ends.begin(), ends.end(),
                                  [&](const Json& e) { return e.at("id") == start.at("id"); });
    ASSERT_NE(end, ends.end());
    EXPECT_EQ(end->at("bp"), "e");
    EXPECT_NE(end->at("pid"), start.at("pid"));
    EXPECT_GE(end->at("ts").get<double>(), start.at("ts").get<double>());
    const auto under = [&](const Json& point, const char* kind) {
      return std::count_if(slices.begin(), slices.end(), [&](const Json& slice) {
        return slice.at("cat") == kind && holds(slice, point);
      });
    };
    EXPECT_EQ(under(start, "send"), 1);
    EXPECT_EQ(under(*end, "wait"), 1);
  }
}

TEST(TraceJson, LeavesOutArrowsWithOneEnd) {
  std::vector<Event> events = exchange();
  std::erase_if(
      events, [](const Event& event) { return event.kind == EventKind::kWait && event.rank == 0; });
  const Json trace = parsed(events);
  EXPECT_EQ(of_phase(trace, "s").size(), 1U);
  EXPECT_EQ(of_phase(trace, "f").size(), 1U);
}

TEST(TraceJson, KeepsHostileTitlesAsText) {
  const std::string hostile = "a\"b\\c\n\x1b[31m</script>";
  EXPECT_EQ(parsed({}, hostile).at("otherData").at("title"), hostile);
  EXPECT_NO_THROW(parsed({}, "not UTF-8: \xff\xc0\x80"));
}

TEST(Messages, MatchTheNthSendWithTheNthWait) {
  std::vector<Event> events;
  for (int n = 0; n < 3; ++n) {
    events.push_back({EventKind::kSend, 0, n, 1, 100 * n, 100 * n + 10, 0, 0});
    events.push_back({EventKind::kWait, 1, n + 1, 0, 100 * n + 5, 100 * n + 50, 0, 0});
    events.push_back({EventKind::kWait, 1, n + 1, 2, 100 * n + 5, 100 * n + 50, 0, 0});
  }
  const std::vector<Message> messages = match_messages(events);
  ASSERT_EQ(messages.size(), 3U);
  for (const Message& message : messages) EXPECT_EQ(message.wait->step, message.send->step + 1);
}

TEST(Recorder, SortsByRankThenTime) {
  Recorder recorder;
  recorder.add({EventKind::kFinish, 1, -1, -1, 5, 6, 0, 0});
  recorder.add({EventKind::kCompute, 1, 0, 1, 2, 3, 0, 0});
  recorder.add({EventKind::kCompute, 0, 0, 0, 9, 10, 0, 0});
  const std::vector<Event> events = recorder.events();
  ASSERT_EQ(events.size(), 3U);
  EXPECT_EQ(events[0].rank, 0);
  EXPECT_EQ(events[1].begin_ns, 2);
  EXPECT_EQ(events[2].kind, EventKind::kFinish);
  EXPECT_EQ(recorder.dropped(), 0);
}

TEST(Recorder, KeepsItsCapacityAndCountsTheRest) {
  Recorder recorder;
  for (std::int64_t n = 0; n < Recorder::kCapacity + 3; ++n) recorder.add({});
  EXPECT_EQ(recorder.dropped(), 3);
  EXPECT_EQ(std::ssize(recorder.events()), Recorder::kCapacity);
}

TEST(Recorder, ClockNeverRunsBackwards) {
  const std::int64_t before = Recorder::now_ns();
  EXPECT_LE(before, Recorder::now_ns());
}

TEST(EventKind, HasDistinctNames) {
  std::set<std::string_view> names;
  for (const EventKind kind : kKinds) names.insert(name(kind));
  EXPECT_EQ(names.size(), std::size(kKinds));
  EXPECT_EQ(name(static_cast<EventKind>(99)), "unknown");
}

}  // namespace
}  // namespace annulus
