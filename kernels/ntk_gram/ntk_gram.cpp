#include "ntk_gram/ntk_gram.hpp"

#include "common/dispatch.hpp"

namespace pk {

void ntk_gram(const NtkProblem<float>& p, float* gram) { PK_CALL_ACTIVE(ntk_gram, (p, gram)); }
void ntk_gram(const NtkProblem<double>& p, double* gram) { PK_CALL_ACTIVE(ntk_gram, (p, gram)); }
void ntk_matvec(const NtkProblem<float>& p, const float* v, std::int64_t columns, float* product) {
    PK_CALL_ACTIVE(ntk_matvec, (p, v, columns, product));
}
void ntk_matvec(const NtkProblem<double>& p, const double* v, std::int64_t columns, double* product) {
    PK_CALL_ACTIVE(ntk_matvec, (p, v, columns, product));
}
void ntk_witness(const NtkProblem<float>& p, const NtkWeights<float>& w, const NtkSums<float>& sums) {
    PK_CALL_ACTIVE(ntk_witness, (p, w, sums));
}
void ntk_witness(const NtkProblem<double>& p, const NtkWeights<double>& w, const NtkSums<double>& sums) {
    PK_CALL_ACTIVE(ntk_witness, (p, w, sums));
}

}  // namespace pk
