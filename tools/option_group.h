// How a verb declares its options.
#pragma once

#include <CLI/CLI.hpp>
#include <string>
#include <utility>
#include <vector>

namespace annulus::tools {

CLI::Validator one_of(const std::vector<std::string>& names);
CLI::Validator at_least_one();
CLI::Validator at_least_ten();
CLI::Validator not_negative();

// Options under one heading of the help.
class OptionGroup {
 public:
  OptionGroup(CLI::App& app, std::string title) : app_(app), title_(std::move(title)) {}

  // `type` stands for the value in the help.
  template <class T>
  CLI::Option* value(const std::string& name, T& to, const std::string& type,
                     const std::string& text) {
    return app_.add_option(name, to, text)->type_name(type)->group(title_);
  }
  template <class T>
  void value(const std::string& name, T& to, const std::string& type, const std::string& text,
             const CLI::Validator& valid) {
    value(name, to, type, text)->check(valid);
  }
  template <class T>
  void flag(const std::string& name, T& to, const std::string& text) {
    app_.add_flag(name, to, text)->group(title_);
  }

 private:
  CLI::App& app_;
  std::string title_;
};

}  // namespace annulus::tools
