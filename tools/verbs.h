// The verbs of the program, one file each. argv[0] is the verb; the result is the exit status.
#pragma once

namespace annulus::tools {

int run_main(int argc, char** argv);
int check_main(int argc, char** argv);
int explain_main(int argc, char** argv);
int bench_main(int argc, char** argv);
int doctor_main(int argc, char** argv);

}  // namespace annulus::tools
